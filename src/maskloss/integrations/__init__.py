"""maskloss inside other libraries: `maskloss.integrations.transformers` and `maskloss.integrations.detr`."""
