// Reading tokenizer.json, the pipeline of huggingface's tokenizers: normalisation, cutting into words, the model.
// What T5's have had over the years is read; any other step is refused, for without it ids would silently differ.
#include "text/unigram_vocabulary.h"

#include "core/error.h"
#include "core/json.h"
#include "core/words.h"

namespace sd {
namespace {

constexpr Json::Limits LIMITS = {64u << 20, 2u << 20, 64};
constexpr const char * SPACE = "\u2581";

class Reader {
  public:
    Reader(const Json & root, UnigramVocabulary & out) : root_(root), out_(out) {}

    void read() {
        read_model(*need(root_, "model"));
        if (const Json * added = root_.find("added_tokens")) {
            for (const Json & token : list(*added, "added_tokens")) {
                read_added(token);
            }
        }
        out_.splits_spaces = false;
        read_step(root_.find("normalizer"), &Reader::read_normalizer);
        read_step(root_.find("pre_tokenizer"), &Reader::read_pre_tokenizer);
        if (!cut_) {
            refuse("has no pre_tokenizer Metaspace");
        }
    }

  private:
    using Step = void (Reader::*)(const std::string & type, const Json & step);

    [[noreturn]] void wrong(const std::string & what) const {
        fail(Status::bad_file, "%s: %s; the file is damaged, or no tokenizer.json", out_.where.c_str(), what.c_str());
    }

    [[noreturn]] void refuse(const std::string & what) const {
        fail(Status::unsupported, "%s: %s, so it is not T5's tokenizer; give T5's tokenizer.json or spiece.model",
             out_.where.c_str(), what.c_str());
    }

    const Json * need(const Json & object, const char * name) const {
        const Json * value = object.find(name);
        if (!value) {
            wrong(text("has no '%s' where it is due", name));
        }
        return value;
    }

    const std::vector<Json> & list(const Json & value, const char * name) const {
        if (!value.array()) {
            wrong(text("'%s' is no list", name));
        }
        return *value.array();
    }

    const std::string & word(const Json & object, const char * name) const {
        const Json * value = need(object, name);
        if (!value->string()) {
            wrong(text("'%s' is no text", name));
        }
        return *value->string();
    }

    bool flag(const Json & object, const char * name, bool otherwise) const {
        const Json * value = object.find(name);
        return value ? value->boolean().value_or(otherwise) : otherwise;
    }

    // A step is null, one step, or a sequence of them.
    void read_step(const Json * step, Step read) {
        if (!step || step->is_null()) {
            return;
        }
        const std::string & type = word(*step, "type");
        if (type != "Sequence") {
            (this->*read)(type, *step);
            return;
        }
        const Json * steps = step->find("normalizers");
        for (const Json & one : list(steps ? *steps : *need(*step, "pretokenizers"), "Sequence")) {
            if (word(one, "type") == "Sequence") {
                refuse("has a sequence inside a sequence");
            }
            (this->*read)(word(one, "type"), one);
        }
    }

    void read_normalizer(const std::string & type, const Json & step) {
        if (type == "Precompiled" && !out_.strips_right && !out_.joins_spaces) {
            out_.charsmap = from_base64(word(step, "precompiled_charsmap"));
        } else if (type == "Strip" && !flag(step, "strip_left", true) && !out_.joins_spaces) {
            out_.strips_right = flag(step, "strip_right", true);
        } else if (type == "Replace" && word(*need(step, "pattern"), "Regex") == " {2,}" &&
                   word(step, "content") == SPACE) {
            out_.joins_spaces = true;
        } else {
            refuse("has the normalizer " + printable(type) + " in a place or form that is not known");
        }
    }

    void read_pre_tokenizer(const std::string & type, const Json & step) {
        if (type == "WhitespaceSplit" && !cut_) {
            out_.splits_spaces = true;
        } else if (type == "Metaspace" && !cut_ && word(step, "replacement") == SPACE && flag(step, "split", true)) {
            const Json *      scheme = step.find("prepend_scheme");
            const std::string when = scheme && scheme->string()           ? *scheme->string()
                                     : flag(step, "add_prefix_space", true) ? "always"
                                                                            : "never";
            if (when != "always" && when != "first" && when != "never") {
                refuse("has the prepend_scheme " + printable(when));
            }
            out_.prefix = when == "always"  ? UnigramVocabulary::Prefix::always
                          : when == "first" ? UnigramVocabulary::Prefix::first
                                            : UnigramVocabulary::Prefix::never;
            cut_ = true;
        } else {
            refuse("has the pre_tokenizer " + printable(type) + " in a place or form that is not known");
        }
    }

    void read_model(const Json & model) {
        const Json * type = model.find("type");
        if (type && type->string() && *type->string() != "Unigram") {
            refuse("has a model of the type " + printable(*type->string()));
        }
        if (flag(model, "byte_fallback", false)) {
            refuse("falls back to bytes");
        }
        for (const Json & entry : list(*need(model, "vocab"), "vocab")) {
            const std::vector<Json> * pair = entry.array();
            if (!pair || pair->size() != 2 || !(*pair)[0].string() || !(*pair)[1].number()) {
                wrong("its vocab is no list of pieces with scores");
            }
            out_.pieces.push_back({*(*pair)[0].string(), *(*pair)[1].number(), UnigramPiece::Kind::normal});
        }
        const Json *                 unknown = model.find("unk_id");
        const std::optional<int64_t> id = unknown ? unknown->integer() : std::nullopt;
        if (!id || *id < 0 || *id >= static_cast<int64_t>(out_.pieces.size())) {
            wrong("its unk_id is no piece of its vocab");
        }
        out_.unknown = static_cast<int32_t>(*id);
    }

    void read_added(const Json & token) {
        const std::optional<int64_t> id = need(token, "id")->integer();
        if (!id || *id < 0 || *id >= INT32_MAX) {
            wrong("an added token has an impossible id");
        }
        if (flag(token, "single_word", false) || flag(token, "normalized", false)) {
            refuse("has the added token " + printable(word(token, "content")) + ", which is single_word or normalized");
        }
        out_.added.push_back({word(token, "content"), static_cast<int32_t>(*id), flag(token, "lstrip", false),
                              flag(token, "rstrip", false)});
    }

    std::string from_base64(const std::string & coded) const {
        constexpr std::string_view LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        std::string                out;
        uint32_t                   bits = 0;
        int                        n_bits = 0;
        for (const char letter : std::string_view(coded).substr(0, coded.find('='))) {
            const size_t value = LETTERS.find(letter);
            if (value == std::string_view::npos) {
                wrong("its precompiled_charsmap is no base64");
            }
            bits = bits << 6 | static_cast<uint32_t>(value);
            n_bits += 6;
            if (n_bits >= 8) {
                n_bits -= 8;
                out.push_back(static_cast<char>(bits >> n_bits & 0xff));
            }
        }
        return out;
    }

    const Json &        root_;
    UnigramVocabulary & out_;
    bool                cut_ = false; // into words
};

} // namespace

UnigramVocabulary read_tokenizer_json(std::string_view json, const std::string & where) {
    const Json        root = Json::parse(json, where, LIMITS);
    UnigramVocabulary out;
    out.where = where;
    Reader(root, out).read();
    return out;
}

} // namespace sd
