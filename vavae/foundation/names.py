"""Short names of foundation models, for `FoundationConfig.model_name`."""

#: Short name → timm's, with the tag that says which weights. CLIP is OpenAI's, in the variants with the activation that
#: it was trained with (QuickGELU); SigLIP 2 is of 256 pixels in patches of 16, so that its grid is the latents'.
SHORT_NAMES = {
    "dinov2-s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-l": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-g": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2-s-reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-b-reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-l-reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2-g-reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3-b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-l": "vit_large_patch16_dinov3.lvd1689m",
    "mae-b": "vit_base_patch16_224.mae",
    "mae-l": "vit_large_patch16_224.mae",
    "mae-h": "vit_huge_patch14_224.mae",
    "clip-b": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip-l": "vit_large_patch14_clip_quickgelu_224.openai",
    "siglip2-b": "vit_base_patch16_siglip_256.v2_webli",
    "siglip2-l": "vit_large_patch16_siglip_256.v2_webli",
    "siglip2-so400m": "vit_so400m_patch16_siglip_256.v2_webli",
    "sam-b": "samvit_base_patch16.sa1b",
    "sam-l": "samvit_large_patch16.sa1b",
    "pe-core-b": "vit_pe_core_base_patch16_224.fb",
    "pe-core-l": "vit_pe_core_large_patch14_336.fb",
    "pe-spatial-b": "vit_pe_spatial_base_patch16_512.fb",
    "pe-spatial-l": "vit_pe_spatial_large_patch14_448.fb",
    "eva02-b": "eva02_base_patch14_224.mim_in22k",
    "eva02-l": "eva02_large_patch14_224.mim_m38m",
}
