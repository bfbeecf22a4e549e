#include "pixels.h"

#include <algorithm>
#include <cmath>

namespace sd {

Tensor image_from_rgb(const uint8_t * rgb, int width, int height) {
    Tensor        image({width, height, 3, 1});
    const int64_t plane = static_cast<int64_t>(width) * height;
    for (int64_t i = 0; i < plane; ++i) {
        for (int64_t channel = 0; channel < 3; ++channel) {
            image.data[channel * plane + i] = static_cast<float>(rgb[3 * i + channel]) / 127.5f - 1.0f;
        }
    }
    return image;
}

void rgb_from_image(const Tensor & images, int64_t index, uint8_t * rgb) {
    const int64_t plane = images.ne[0] * images.ne[1];
    const float * image = images.data.data() + index * 3 * plane;
    for (int64_t i = 0; i < plane; ++i) {
        for (int64_t channel = 0; channel < 3; ++channel) {
            const float value = image[channel * plane + i] * 0.5f + 0.5f;
            // A NaN compares false with everything and becomes black.
            rgb[3 * i + channel] = static_cast<uint8_t>(std::lround(255.0f * (value > 0 ? std::min(value, 1.0f) : 0.0f)));
        }
    }
}

Tensor latent_mask(const uint8_t * grey, int width, int height, int reduction) {
    Tensor mask({width / reduction, height / reduction, 1, 1});
    for (int64_t y = 0; y < mask.ne[1]; ++y) {
        for (int64_t x = 0; x < mask.ne[0]; ++x) {
            int sum = 0;
            for (int j = 0; j < reduction; ++j) {
                for (int i = 0; i < reduction; ++i) {
                    sum += grey[(y * reduction + j) * width + x * reduction + i];
                }
            }
            mask.data[y * mask.ne[0] + x] = static_cast<float>(sum) / static_cast<float>(255 * reduction * reduction);
        }
    }
    return mask;
}

} // namespace sd
