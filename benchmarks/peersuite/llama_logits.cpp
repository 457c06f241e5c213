// Writes the float32 logits that llama.cpp computes at every position of some windows of tokens.
//
//   llama_logits MODEL IDS NUM_WINDOWS ROWS THREADS OUT
//
// IDS   int32 [NUM_WINDOWS, length], in the machine's byte order; every window starts from an empty context
// ROWS  tokens computed at once: 1 is what decoding runs, more what a prompt runs
// OUT   float32 [NUM_WINDOWS, length, vocab]

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "llama.h"

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

std::vector<int32_t> read_ids(const char* path) {
  std::ifstream in(path, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (!in || bytes.empty() || bytes.size() % sizeof(int32_t) != 0) fail("the file of ids cannot be read");
  const auto* ids = reinterpret_cast<const int32_t*>(bytes.data());
  return {ids, ids + bytes.size() / sizeof(int32_t)};
}

llama_context* open_context(llama_model* model, int length, int rows, int threads) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = length;
  params.n_batch = params.n_ubatch = rows;
  params.n_threads = params.n_threads_batch = threads;
  return llama_init_from_model(model, params);
}

// Computes tokens [first, first + count) of a window and appends their logits to `out`.
void run_rows(llama_context* context, const int32_t* ids, int first, int count, int vocab, std::ofstream& out) {
  llama_batch batch = llama_batch_init(count, 0, 1);
  batch.n_tokens = count;
  for (int i = 0; i < count; ++i) {
    batch.token[i] = ids[first + i];
    batch.pos[i] = first + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  if (llama_decode(context, batch) != 0) fail("llama_decode failed");
  for (int i = 0; i < count; ++i) {
    const float* logits = llama_get_logits_ith(context, i);
    out.write(reinterpret_cast<const char*>(logits), sizeof(float) * static_cast<size_t>(vocab));
  }
  llama_batch_free(batch);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) fail("usage: llama_logits MODEL IDS NUM_WINDOWS ROWS THREADS OUT");
  const std::vector<int32_t> ids = read_ids(argv[2]);
  const int num_windows = std::atoi(argv[3]), rows = std::atoi(argv[4]), threads = std::atoi(argv[5]);
  if (num_windows < 1 || rows < 1 || threads < 1 || ids.size() % num_windows != 0) fail("sizes do not fit");
  const int length = static_cast<int>(ids.size() / num_windows);

  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) fail("the model cannot be loaded");
  llama_context* context = open_context(model, length, rows, threads);
  if (context == nullptr) fail("no context");
  const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  std::ofstream out(argv[6], std::ios::binary);
  for (int window = 0; window < num_windows; ++window) {
    llama_memory_clear(llama_get_memory(context), true);
    const int32_t* start = ids.data() + static_cast<size_t>(window) * length;
    for (int first = 0; first < length; first += rows) {
      run_rows(context, start, first, rows < length - first ? rows : length - first, vocab, out);
    }
  }
  if (!out.flush()) fail("the logits cannot be written");
  llama_free(context);
  llama_model_free(model);
}
