"""Networks: classifiers, generator, discriminator; no batch statistics where losses must not depend on ranks."""
