import numpy as np
from transformers import ViTFeatureExtractor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import to_numpy_array


class MiniInternImageProcessor(ViTFeatureExtractor):
    """Cuts the middle out and normalises."""

    model_input_names = ["pixel_values"]

    def __init__(self, size=16, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25), **kwargs):
        super().__init__(size={"height": size, "width": size}, image_mean=list(image_mean), image_std=list(image_std), **kwargs)
        self.crop = size

    def preprocess(self, images, return_tensors=None, **kwargs):
        images = images if isinstance(images, (list, tuple)) else [images]
        made = []
        for image in images:
            array = to_numpy_array(image).astype(np.float32) / 255.0
            top, left = (array.shape[0] - self.crop) // 2, (array.shape[1] - self.crop) // 2
            array = array[top : top + self.crop, left : left + self.crop]
            made.append(((array - np.array(self.image_mean)) / np.array(self.image_std)).transpose(2, 0, 1).astype(np.float32))
        return BatchFeature(data={"pixel_values": made}, tensor_type=return_tensors)
