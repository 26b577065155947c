"""Networks: classifiers, generator, discriminator; without batch statistics if losses must not depend on ranks."""
