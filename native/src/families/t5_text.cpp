#include "families/t5_text.h"

#include "checkpoint/diffusers_folder.h"
#include "core/error.h"

#include <algorithm>

namespace sd {
namespace {

constexpr const char * SHIPPED = "t5_spiece.model";

UnigramVocabulary read_shipped(const std::string & data_dir) {
    return read_unigram_vocabulary(path_in(data_dir, SHIPPED));
}

// As llama.cpp's converter writes it. Files whose normalisation is missing get the one that ships: it is T5's.
UnigramVocabulary read_gguf_vocabulary(const Checkpoint & checkpoint, const MappedFile & file, const StoredArray & tokens,
                                       const std::string & data_dir) {
    const char *        path = file.path().c_str();
    const StoredArray * scores = checkpoint.find_array(&file, "tokenizer.ggml.scores");
    const StoredArray * types = checkpoint.find_array(&file, "tokenizer.ggml.token_type");
    const StoredArray * charsmap = checkpoint.find_array(&file, "tokenizer.ggml.precompiled_charsmap");

    const std::vector<std::string> texts = tokens.texts();
    const std::vector<double>      values = scores ? scores->numbers() : std::vector<double>();
    const std::vector<double>      kinds = types ? types->numbers() : std::vector<double>();
    if (texts.empty() || values.size() != texts.size() || kinds.size() != texts.size()) {
        fail(Status::bad_file, "%s: its tokenizer has %zu tokens, %zu scores and %zu types; the file is damaged", path,
             texts.size(), values.size(), kinds.size());
    }
    UnigramVocabulary out;
    out.where = file.path();
    for (size_t i = 0; i < texts.size(); ++i) {
        if (!(kinds[i] >= 1 && kinds[i] <= 6)) {
            fail(Status::bad_file, "%s: token %zu of its tokenizer is of the unknown type %g; the file is damaged", path, i,
                 kinds[i]);
        }
        out.pieces.push_back({texts[i], values[i], static_cast<UnigramPiece::Kind>(static_cast<int>(kinds[i]))});
    }
    add_special_tokens(out);
    out.charsmap = charsmap ? charsmap->bytes() : read_shipped(data_dir).charsmap;
    return out;
}

// The tokenizer that belongs to a file of weights in diffusers' or transformers' layout; "" where none is beside it.
// Folders of plain files may hold a tokenizer.json of anything.
std::string beside(const std::string & path) {
    const size_t      slash = path.find_last_of("/\\");
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash);
    const size_t      encoder = folder.rfind("text_encoder");
    std::vector<std::string> places{path_in(folder, "spiece.model")};
    if (is_file(path_in(folder, "config.json"))) {
        places.push_back(path_in(folder, "tokenizer.json"));
    }
    if (encoder != std::string::npos && folder.find_first_of("/\\", encoder) == std::string::npos) {
        const std::string tokenizer = folder.substr(0, encoder) + "tokenizer" + folder.substr(encoder + 12);
        places.push_back(path_in(tokenizer, "spiece.model"));
        places.push_back(path_in(tokenizer, "tokenizer.json"));
    }
    const auto found = std::find_if(places.begin(), places.end(), is_file);
    return found == places.end() ? "" : *found;
}

} // namespace

T5Unigram open_t5_tokenizer(const Checkpoint & checkpoint, const Scope & t5, const std::string & data_dir) {
    if (const StoredTensor * norm = t5.at("encoder.final_layer_norm").find()) {
        if (const StoredArray * tokens = checkpoint.find_array(norm->file, "tokenizer.ggml.tokens")) {
            return T5Unigram(read_gguf_vocabulary(checkpoint, *norm->file, *tokens, data_dir));
        }
        const std::string given = beside(norm->file->path());
        if (!given.empty()) {
            return T5Unigram(read_unigram_vocabulary(given));
        }
    }
    return T5Unigram(read_shipped(data_dir));
}

T5Text::T5Text(const Checkpoint & checkpoint, const Scope & t5, const std::string & data_dir)
    : encoder_(t5, T5Config::read(t5)), unigram_(open_t5_tokenizer(checkpoint, t5, data_dir)) {
    if (unigram_.size() > encoder_.c.vocabulary) {
        fail(Status::bad_file, "%s: its tokenizer has %d tokens, its table of embeddings %lld; they belong to different models",
             unigram_.where().c_str(), unigram_.size(), static_cast<long long>(encoder_.c.vocabulary));
    }
}

TokenChunk T5Text::all_tokens(const Prompt & prompt) const {
    TokenChunk chunk;
    for (const Span & span : prompt) {
        const std::vector<int32_t> ids = unigram_.encode(span.text);
        chunk.ids.insert(chunk.ids.end(), ids.begin(), ids.end());
        chunk.weights.resize(chunk.ids.size(), span.weight);
    }
    return chunk;
}

std::string T5Text::unread(const Prompt & prompt, int64_t length) const {
    const std::vector<int32_t> ids = all_tokens(prompt).ids;
    const auto                 most = static_cast<size_t>(length - 1);
    if (ids.size() <= most) {
        return "";
    }
    const std::string cut = unigram_.decode({ids.begin() + static_cast<ptrdiff_t>(most), ids.end()});
    return text("T5 reads %zu tokens, and the prompt has %zu; left out: \"", most, ids.size()) + cut + '"';
}

TokenChunk T5Text::tokens(const Prompt & prompt, int64_t length) const {
    TokenChunk chunk = all_tokens(prompt);
    const auto most = static_cast<size_t>(length);
    chunk.ids.resize(std::min(chunk.ids.size(), most - 1));
    chunk.ids.push_back(T5Unigram::end_token);
    chunk.ids.resize(most, T5Unigram::pad_token);
    chunk.weights.resize(std::min(chunk.weights.size(), most - 1));
    chunk.weights.resize(most, 1.0f);
    return chunk;
}

Tensor T5Text::encode(Runner & runner, const TokenChunk & chunk) const {
    Tensor ids({static_cast<int64_t>(chunk.ids.size()), 1, 1, 1});
    std::copy(chunk.ids.begin(), chunk.ids.end(), ids.data.begin());
    auto outputs = runner.run("t5", {{"t5_ids", &ids}}, [&](Graph & g) { g.output("states", (*this)(g)); });
    return std::move(outputs.at("states"));
}

} // namespace sd
