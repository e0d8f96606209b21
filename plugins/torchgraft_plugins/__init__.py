"""The bundled methods: one module each, written with the public names of torchgraft alone."""
