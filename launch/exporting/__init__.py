"""What `python -m launch export` writes: this project's own files, folders of diffusers, model cards."""
