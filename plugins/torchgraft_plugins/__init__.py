"""The bundled methods, one module or package each. They import only public names of torchgraft."""
