// Which tokens a grammar allows: an automaton over bytes, walked along the trie of a vocabulary.
//
// A state's row is derived when it is first asked for, and kept in a cache of bounded size that all grammars share. Any
// number of threads may ask at once; a row that is in use outlives its place in the cache.
#pragma once
#include <atomic>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "grammar/trie.h"

namespace sg {

// The tokens that one state allows, stop ids included. Few are listed, many are bits.
struct MaskRow {
  enum class Kind { kForced, kSparse, kDense };
  Kind kind;
  std::vector<int32_t> ids;     // forced, sparse: ascending
  std::vector<uint32_t> words;  // dense: bit t & 31 of word t >> 5 for token t
  int64_t bytes() const { return int64_t(sizeof(*this) + 4 * (ids.capacity() + words.capacity())); }
};
using RowPtr = std::shared_ptr<const MaskRow>;

class MaskTable;

// Rows of any number of tables, those that were not used for longest thrown out first.
class MaskCache {
 public:
  explicit MaskCache(int64_t max_bytes) : max_bytes_(max_bytes) {}
  RowPtr find(const MaskTable* table, int32_t state);
  // The row that is kept for the state from now on: the one that another thread was quicker with, or this one.
  RowPtr keep(const MaskTable* table, int32_t state, RowPtr row);
  void forget(const MaskTable* table);
  int64_t bytes() const;
  int64_t num_rows() const;

 private:
  struct Key {
    const MaskTable* table;
    int32_t state;
    bool operator==(const Key& other) const { return table == other.table && state == other.state; }
  };
  struct Hash {
    size_t operator()(const Key& key) const {
      return std::hash<const void*>()(key.table) * 31 + size_t(uint32_t(key.state)) * 0x9e3779b97f4a7c15u;
    }
  };
  struct Entry {
    Key key;
    RowPtr row;
    int64_t bytes;
  };
  const int64_t max_bytes_;
  mutable std::mutex mutex_;
  std::list<Entry> entries_;  // used last in front
  std::unordered_map<Key, std::list<Entry>::iterator, Hash> places_;
  int64_t bytes_ = 0;
};

// An automaton whose every state reaches an accepting one; it starts in state 0.
struct Automaton {
  static constexpr int32_t kNone = -1;
  std::vector<uint8_t> classes;      // [256] byte -> class
  std::vector<int32_t> transitions;  // [num_states, num_classes] kNone: no way on
  std::vector<uint8_t> accepting;    // [num_states]
  int32_t num_classes = 0;

  int32_t num_states() const { return int32_t(accepting.size()); }
  const int32_t* row(int32_t state) const { return transitions.data() + int64_t(state) * num_classes; }
  int32_t next(int32_t state, uint8_t byte) const { return row(state)[classes[byte]]; }
  // Throws std::invalid_argument where sizes or targets are wrong.
  void check() const;
};

class MaskTable {
 public:
  static constexpr int32_t kNone = Automaton::kNone;

  MaskTable(std::shared_ptr<const TokenTrie> trie, Automaton automaton, std::vector<int32_t> stop_ids,
            std::shared_ptr<MaskCache> cache);
  ~MaskTable();
  MaskTable(const MaskTable&) = delete;
  MaskTable& operator=(const MaskTable&) = delete;

  int32_t num_states() const { return automaton_.num_states(); }
  int32_t vocab() const { return trie_->vocab(); }
  const std::vector<int32_t>& stop_ids() const { return stop_ids_; }
  int64_t bytes() const;
  // Whether the tokens of the vocabulary can spell any whole output.
  bool is_spellable() const { return is_live(0); }

  // The state after a token, which is no stop id, or bytes; kNone where they are not allowed.
  int32_t next_token(int32_t state, int32_t token) const;
  int32_t next_bytes(int32_t state, std::string_view bytes) const;
  bool is_stop(int32_t token) const;
  // Whether the output may end in the state, and whether it has to.
  bool may_stop(int32_t state) const { return automaton_.accepting[size_t(state)] != 0; }
  bool must_stop(int32_t state) const { return may_stop(state) && first_tokens(state) == 0; }
  RowPtr row(int32_t state) const;
  // The one token that is allowed, or kNone: there are several, or the output may end.
  int32_t forced_token(int32_t state) const;
  // The tokens that follow without a choice, at most `limit`.
  std::vector<int32_t> forced_run(int32_t state, int32_t limit) const;
  // The bytes that follow without a choice, at most `limit`.
  std::string forced_bytes(int32_t state, int32_t limit) const;
  // Tokens that probably follow, at most `limit`: the text does, but not how it is cut. The longest tokens are taken.
  std::vector<int32_t> likely_run(int32_t state, int32_t limit) const;

 private:
  // Of a state: the kinds of characters that all lead to one and the same state, where letters do; and how many
  // characters of these kinds may follow, whichever: 255 is any number of them.
  struct Text {
    Kinds kinds : 42;
    Kinds run : 8;
    Kinds is_exact : 1;  // after `run` of them none of these kinds may follow
  };
  static constexpr int kEndless = 255;

  template <class F>
  void walk(int32_t state, Kinds known, F&& found) const;
  bool takes_all(uint32_t node, int32_t state) const;
  MaskRow derive(int32_t state) const;
  int32_t first_tokens(int32_t state) const;
  bool is_live(int32_t state) const { return live_.empty() || live_[size_t(state)] != 0; }
  void find_texts();
  int32_t after_letters(int32_t state) const;
  Kinds kinds_to(int32_t state, int32_t target) const;
  bool takes_multibyte(int32_t state, int32_t target) const;
  bool takes_any(int32_t state, Kinds kinds) const;
  void find_plain_tokens();
  bool is_token(uint8_t byte) const;
  void find_live();

  const std::shared_ptr<const TokenTrie> trie_;
  const Automaton automaton_;
  std::vector<int32_t> stop_ids_;  // ascending
  const std::shared_ptr<MaskCache> cache_;
  std::vector<Text> texts_;                                               // per state; empty: of none
  std::map<Kinds, std::shared_ptr<const TokenTrie::PlainTokens>> plain_;  // of the kinds of most states
  std::vector<uint8_t> live_;  // per state, whether tokens lead to an end from it; empty: from all
  // Per state what first_tokens found: not asked yet, none, one (its id, shifted), several.
  mutable std::vector<std::atomic<int32_t>> first_tokens_;
};

}  // namespace sg
