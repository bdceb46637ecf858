import numpy as np
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import rescale, to_channel_dimension_format
from transformers.image_utils import ChannelDimension, make_list_of_images, to_numpy_array


class MiniRMBGImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]

    def __init__(self, size=None, do_rescale=True, **kwargs):
        super().__init__(**kwargs)
        self.size = size if size is not None else [16, 16]
        self.do_rescale = do_rescale

    def nearest(self, array):
        rows = np.arange(self.size[0]) * array.shape[0] // self.size[0]
        columns = np.arange(self.size[1]) * array.shape[1] // self.size[1]
        return array[rows][:, columns]

    def preprocess(self, images, return_tensors=None, **kwargs):
        arrays = [self.nearest(to_numpy_array(image)) for image in make_list_of_images(images)]
        if self.do_rescale:
            arrays = [rescale(array, scale=1 / 255.0) - 0.5 for array in arrays]
        arrays = [
            to_channel_dimension_format(a, ChannelDimension.FIRST, input_channel_dim=ChannelDimension.LAST).astype(np.float32)
            for a in arrays
        ]
        return BatchFeature(data={"pixel_values": arrays}, tensor_type=return_tensors)
