"""The functions of all figures by one name; each is in the file that is named after it."""

from launch.evaluation.frechet import frechet_distance
from launch.evaluation.inception_score import inception_score
from launch.evaluation.kid import kernel_distance
from launch.evaluation.moments import NOT_STATED, FeatureStatistics, Moments, require_moments
from launch.evaluation.pixel_figures import psnr, ssim
from launch.evaluation.precision_recall import precision_recall
from launch.evaluation.uniformity import Uniformity, gaussian_kde, latent_uniformity, uniformity

__all__ = [
    "NOT_STATED",
    "FeatureStatistics",
    "Moments",
    "Uniformity",
    "frechet_distance",
    "gaussian_kde",
    "inception_score",
    "kernel_distance",
    "latent_uniformity",
    "precision_recall",
    "psnr",
    "require_moments",
    "ssim",
    "uniformity",
]
