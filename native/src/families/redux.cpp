#include "families/redux.h"

#include "core/error.h"

namespace sd {

std::optional<Redux> Redux::find(const WeightStore & weights, const Scope & vision, const Scope & here,
                                 int64_t context) {
    const bool sees = vision.at("vision_model.embeddings.patch_embedding").has(), embeds = here.at("redux_up").has();
    if (!sees && !embeds) {
        return std::nullopt;
    }
    if (!sees || !embeds) {
        fail(Status::bad_file, "%s: Redux needs two files, and one is missing; give %s",
             weights.checkpoint().path().c_str(),
             sees ? "the image embedder as redux=" : "SigLIP's image tower as clip_vision=");
    }
    const int64_t written = here.at("redux_down").has() ? here.at("redux_down").find()->ne[1] : context;
    if (written != context) {
        fail(Status::unsupported, "%s: Redux writes tokens of %lld features, but the transformer reads %lld",
             weights.checkpoint().path().c_str(), static_cast<long long>(written), static_cast<long long>(context));
    }
    return Redux{vision, here, context};
}

} // namespace sd
