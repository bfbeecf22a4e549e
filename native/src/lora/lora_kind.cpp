#include "lora/lora_module.h"

namespace sd {

const char * lora_kind_name(LoraKind kind) {
    switch (kind) {
    case LoraKind::low_rank: return "lora";
    case LoraKind::loha: return "loha";
    case LoraKind::lokr: return "lokr";
    case LoraKind::dense: return "diff";
    case LoraKind::replace: return "replacement";
    case LoraKind::ia3: return "ia3";
    case LoraKind::glora: return "glora";
    case LoraKind::oft: return "oft";
    case LoraKind::boft: return "boft";
    case LoraKind::oft_input: return "input oft";
    }
    return "?";
}

} // namespace sd
