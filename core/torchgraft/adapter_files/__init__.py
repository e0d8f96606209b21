"""Read, check and write adapter directories, torchgraft's and PEFT's."""
