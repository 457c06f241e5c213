#include "grammar/masks.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sg {
namespace {

constexpr int32_t kUnknown = -1;       // of first_tokens_
constexpr int32_t kNoToken = 0;        // none is allowed
constexpr int32_t kSeveralTokens = 1;  // and from 2 on: one token, its id + 2
constexpr int32_t kOneToken = 2;

void set_bit(std::vector<uint32_t>& words, int32_t id) { words[size_t(id) / 32] |= 1u << (id % 32); }

// Few ids are as small as bits, and much quicker to sample from.
int64_t most_listed(int32_t vocab) { return std::max<int64_t>(16, vocab / 32); }

MaskRow make_row(std::vector<uint32_t> words, int32_t vocab) {
  int64_t count = 0;
  for (const uint32_t word : words) count += __builtin_popcount(word);
  if (count > most_listed(vocab)) return {MaskRow::Kind::kDense, {}, std::move(words)};
  std::vector<int32_t> ids;
  ids.reserve(size_t(count));
  for (size_t i = 0; i < words.size(); ++i) {
    for (uint32_t word = words[i]; word != 0; word &= word - 1) ids.push_back(int32_t(i * 32) + __builtin_ctz(word));
  }
  return {count == 1 ? MaskRow::Kind::kForced : MaskRow::Kind::kSparse, std::move(ids), {}};
}

}  // namespace

// ---- the cache ------------------------------------------------------------------------------------------------------

RowPtr MaskCache::find(const MaskTable* table, int32_t state) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto place = places_.find({table, state});
  if (place == places_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, place->second);
  return place->second->row;
}

RowPtr MaskCache::keep(const MaskTable* table, int32_t state, RowPtr row) {
  std::list<Entry> dropped;  // freed after the lock is
  const std::lock_guard<std::mutex> lock(mutex_);
  const Key key{table, state};
  const auto place = places_.find(key);
  if (place != places_.end()) return place->second->row;
  const int64_t bytes = row->bytes() + int64_t(sizeof(Entry) + sizeof(Key) + 4 * sizeof(void*));
  if (bytes > max_bytes_) return row;
  while (bytes_ + bytes > max_bytes_) {
    bytes_ -= entries_.back().bytes;
    places_.erase(entries_.back().key);
    dropped.splice(dropped.begin(), entries_, std::prev(entries_.end()));
  }
  entries_.push_front({key, row, bytes});
  places_[key] = entries_.begin();
  bytes_ += bytes;
  return row;
}

void MaskCache::forget(const MaskTable* table) {
  std::list<Entry> dropped;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto entry = entries_.begin(); entry != entries_.end();) {
    const auto next = std::next(entry);
    if (entry->key.table == table) {
      bytes_ -= entry->bytes;
      places_.erase(entry->key);
      dropped.splice(dropped.begin(), entries_, entry);
    }
    entry = next;
  }
}

int64_t MaskCache::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

int64_t MaskCache::num_rows() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return int64_t(entries_.size());
}

// ---- the automaton --------------------------------------------------------------------------------------------------

void Automaton::check() const {
  const auto fail = [](const std::string& message) { throw std::invalid_argument("automaton: " + message); };
  if (classes.size() != 256) fail("expected a class for each of 256 bytes, got " + std::to_string(classes.size()));
  if (num_classes < 1) fail("expected a class of bytes, got none");
  for (const uint8_t c : classes) {
    if (c >= num_classes) fail("expected classes below " + std::to_string(num_classes) + ", got " + std::to_string(c));
  }
  if (accepting.empty()) fail("expected a state, got none");
  if (int64_t(transitions.size()) != int64_t(num_states()) * num_classes)
    fail("transitions: expected states * classes");
  for (const int32_t target : transitions) {
    if (target < kNone || target >= num_states()) fail("no state has the number " + std::to_string(target));
  }
}

// ---- the table ------------------------------------------------------------------------------------------------------

MaskTable::MaskTable(std::shared_ptr<const TokenTrie> trie, Automaton automaton, std::vector<int32_t> stop_ids,
                     std::shared_ptr<MaskCache> cache)
    : trie_(std::move(trie)),
      automaton_((automaton.check(), std::move(automaton))),
      stop_ids_(std::move(stop_ids)),
      cache_(std::move(cache)),
      first_tokens_(size_t(automaton_.num_states())) {
  std::sort(stop_ids_.begin(), stop_ids_.end());
  stop_ids_.erase(std::unique(stop_ids_.begin(), stop_ids_.end()), stop_ids_.end());
  for (const int32_t id : stop_ids_) {
    if (id < 0 || id >= vocab() || !trie_->token(id).empty()) {
      throw std::invalid_argument("stop_ids: expected ids of the vocabulary without text, got " + std::to_string(id));
    }
  }
  for (auto& first : first_tokens_) first.store(kUnknown, std::memory_order_relaxed);
  find_live();
  find_texts();
}

MaskTable::~MaskTable() { cache_->forget(this); }

int64_t MaskTable::bytes() const {
  const int64_t states = num_states();
  return states * (4 * automaton_.num_classes + 1 + int64_t(sizeof(Text)) + 4) + int64_t(live_.size()) + 256;
}

// Calls found(first, last, state) for stretches of the trie's ids that the automaton allows from `state` on, and a
// state that they lead to; ends where it returns false. Tokens of `known` kinds alone are passed over.
template <class F>
void MaskTable::walk(int32_t state, Kinds known, F&& found) const {
  const TokenTrie& trie = *trie_;
  const int32_t* ids = trie.ids();
  std::vector<int32_t> states(size_t(trie.max_depth()) + 1);
  states[0] = state;
  uint32_t num_known = 0;  // how many bytes of the way down are of known kinds
  for (int byte = 0; byte < 256; ++byte) {
    const uint32_t first = trie.child_of_root(uint8_t(byte));
    if (first == 0xffffffffu || automaton_.next(state, uint8_t(byte)) == kNone) continue;
    const uint32_t end = trie.node(first).skip;
    for (uint32_t i = first; i < end;) {
      const TokenTrie::Node& node = trie.node(i);
      const uint32_t above = node.depth - 1u;
      const int32_t next = automaton_.next(states[above], node.byte);
      if (next == kNone) {
        i = node.skip;
        continue;
      }
      states[node.depth] = next;
      if (known != 0) {
        const TokenTrie::About about = trie.about(i);
        num_known = std::min(num_known, above);
        if (num_known == above && (known >> about.kind & 1)) {
          num_known = node.depth;
          i = (about.below & ~known) == 0 ? node.skip : i + 1;
          continue;
        }
      }
      const uint32_t after = takes_all(i, next) ? node.skip : i + 1;
      const uint32_t last_id = trie.node(after).first_id;
      if (last_id > node.first_id && is_live(next) && !found(ids + node.first_id, ids + last_id, next)) return;
      i = after;
    }
  }
}

// Whether every token below a node is allowed that is reached in `state`.
bool MaskTable::takes_all(uint32_t node, int32_t state) const {
  const Text text = texts_.empty() ? Text{} : texts_[size_t(state)];
  if (text.kinds == 0) return false;
  const TokenTrie::About about = trie_->about(node);
  return about.is_boundary && (about.below & ~text.kinds) == 0 && about.height <= text.run;
}

MaskRow MaskTable::derive(int32_t state) const {
  std::vector<uint32_t> words(size_t(mask_words(vocab())));
  Kinds known = 0;
  const Text text = texts_.empty() ? Text{} : texts_[size_t(state)];
  const auto plain = plain_.find(text.kinds);
  if (plain != plain_.end() && (text.is_exact || text.run == kEndless || text.run >= trie_->max_depth())) {
    known = text.kinds;
    words = plain->second->at_most(text.run == kEndless ? trie_->max_depth() : text.run);
  }
  walk(state, known, [&](const int32_t* first, const int32_t* last, int32_t) {
    for (; first != last; ++first) set_bit(words, *first);
    return true;
  });
  if (may_stop(state)) {
    for (const int32_t id : stop_ids_) set_bit(words, id);
  }
  return make_row(std::move(words), vocab());
}

RowPtr MaskTable::row(int32_t state) const {
  if (RowPtr known = cache_->find(this, state)) return known;
  return cache_->keep(this, state, std::make_shared<const MaskRow>(derive(state)));
}

int32_t MaskTable::next_token(int32_t state, int32_t token) const {
  if (token < 0 || token >= vocab() || trie_->token(token).empty()) return kNone;
  const int32_t next = next_bytes(state, trie_->token(token));
  return next != kNone && is_live(next) ? next : kNone;
}

int32_t MaskTable::next_bytes(int32_t state, std::string_view bytes) const {
  for (const char byte : bytes) {
    if (state == kNone) break;
    state = automaton_.next(state, uint8_t(byte));
  }
  return state;
}

bool MaskTable::is_stop(int32_t token) const { return std::binary_search(stop_ids_.begin(), stop_ids_.end(), token); }

int32_t MaskTable::first_tokens(int32_t state) const {
  std::atomic<int32_t>& known = first_tokens_[size_t(state)];
  int32_t result = known.load(std::memory_order_relaxed);
  if (result != kUnknown) return result;
  result = kNoToken;
  walk(state, 0, [&](const int32_t* first, const int32_t* last, int32_t) {
    result = result == kNoToken && last - first == 1 ? *first + kOneToken : kSeveralTokens;
    return result != kSeveralTokens;
  });
  known.store(result, std::memory_order_relaxed);
  return result;
}

int32_t MaskTable::forced_token(int32_t state) const {
  if (may_stop(state)) return kNone;
  const int32_t first = first_tokens(state);
  return first >= kOneToken ? first - kOneToken : kNone;
}

std::vector<int32_t> MaskTable::forced_run(int32_t state, int32_t limit) const {
  std::vector<int32_t> run;
  while (int32_t(run.size()) < limit) {
    const int32_t token = forced_token(state);
    if (token == kNone) break;
    run.push_back(token);
    state = next_token(state, token);
  }
  return run;
}

std::string MaskTable::forced_bytes(int32_t state, int32_t limit) const {
  std::string run;
  while (int32_t(run.size()) < limit && !may_stop(state)) {
    int32_t only = kNone;
    for (int byte = 0; byte < 256; ++byte) {
      if (automaton_.next(state, uint8_t(byte)) == kNone) continue;
      if (only != kNone) return run;
      only = byte;
    }
    if (only == kNone) break;
    run.push_back(char(only));
    state = automaton_.next(state, uint8_t(only));
  }
  return run;
}

std::vector<int32_t> MaskTable::likely_run(int32_t state, int32_t limit) const {
  constexpr int32_t kTokenBytes = 8;
  std::vector<int32_t> run;
  const std::string text = forced_bytes(state, limit * kTokenBytes);
  for (std::string_view rest = text; !rest.empty() && int32_t(run.size()) < limit;) {
    const int32_t token = trie_->longest_token(rest);
    if (token < 0) break;
    run.push_back(token);
    rest.remove_prefix(trie_->token(token).size());
  }
  return run;
}

// ---- states within a text -------------------------------------------------------------------------------------------

void MaskTable::find_texts() {
  // NOTE: what lies below a node is not looked at state by state, so every state has to be live.
  if (!live_.empty()) return;
  std::vector<Text> texts(size_t(num_states()), Text{});
  std::vector<int32_t> targets(size_t(num_states()), kNone);
  for (int32_t state = 0; state < num_states(); ++state) {
    const int32_t target = after_letters(state);
    targets[size_t(state)] = target;
    if (target != kNone) texts[size_t(state)] = {kinds_to(state, target), Kinds(target == state ? kEndless : 0), 0};
  }
  // A chain of states that take the same kinds, or more and more, is as good as one state for as many characters.
  for (int32_t state = 0; state < num_states(); ++state) {
    std::vector<int32_t> chain;
    for (int32_t at = state; texts[size_t(at)].run == 0 && texts[size_t(at)].kinds != 0;) {
      texts[size_t(at)].run = 1;
      chain.push_back(at);
      const int32_t target = targets[size_t(at)];
      if ((texts[size_t(at)].kinds & ~texts[size_t(target)].kinds) != 0) break;
      at = target;
    }
    for (; !chain.empty(); chain.pop_back()) {
      Text& text = texts[size_t(chain.back())];
      const Text after = texts[size_t(targets[size_t(chain.back())])];
      if ((text.kinds & ~after.kinds) != 0) {
        text.is_exact = !takes_any(targets[size_t(chain.back())], text.kinds);
        continue;
      }
      text.run = after.run == kEndless ? kEndless : std::min<Kinds>(kEndless - 1, after.run + 1);
      text.is_exact = after.is_exact && after.run < kEndless - 1 && after.kinds == text.kinds;
    }
  }
  texts_ = std::move(texts);
  find_plain_tokens();
}

// Now rather than when a row is derived, which holds up a step.
void MaskTable::find_plain_tokens() {
  constexpr size_t kMost = 4;
  std::map<Kinds, int32_t> counts;
  for (const Text text : texts_) {
    if (text.kinds != 0) counts[text.kinds]++;
  }
  while (plain_.size() < kMost && !counts.empty()) {
    const auto most = std::max_element(counts.begin(), counts.end(),
                                       [](const auto& a, const auto& b) { return a.second < b.second; });
    plain_[most->first] = trie_->plain_tokens(most->first);
    counts.erase(most);
  }
}

// Whether a character of any of these kinds may begin.
bool MaskTable::takes_any(int32_t state, Kinds kinds) const {
  for (int byte = 0; byte < 256; ++byte) {
    const int kind = byte < 0x80 ? ascii_kind(uint8_t(byte)) : kMultibyte;
    if ((kinds >> kind & 1) && automaton_.next(state, uint8_t(byte)) != kNone) return true;
  }
  return false;
}

// The state that every lower-case letter leads to, or kNone.
int32_t MaskTable::after_letters(int32_t state) const {
  const int32_t target = automaton_.next(state, 'a');
  for (uint8_t letter = 'b'; letter <= 'z'; ++letter) {
    if (automaton_.next(state, letter) != target) return kNone;
  }
  return target;
}

// The kinds of characters that all lead to `target`.
Kinds MaskTable::kinds_to(int32_t state, int32_t target) const {
  Kinds kinds = (Kinds(1) << kAsciiKinds) - 1;
  for (uint8_t byte = 0; byte < 0x80; ++byte) {
    if (automaton_.next(state, byte) != target) kinds &= ~(Kinds(1) << ascii_kind(byte));
  }
  return takes_multibyte(state, target) ? kinds | Kinds(1) << kMultibyte : kinds;
}

// Whether all characters from U+00A0 on lead to `target`: both machines are run side by side.
bool MaskTable::takes_multibyte(int32_t state, int32_t target) const {
  struct Pair {
    int32_t state;
    uint8_t utf8;
    bool operator==(const Pair& other) const { return state == other.state && utf8 == other.utf8; }
  };
  std::vector<Pair> pairs = {{state, utf8::kBoundary}};
  for (size_t i = 0; i < pairs.size() && pairs.size() < 64; ++i) {
    for (int byte = 0x80; byte < 0x100; ++byte) {
      const uint8_t then = utf8::next(pairs[i].utf8, uint8_t(byte));
      if (then == utf8::kInvalid) continue;
      const int32_t next = automaton_.next(pairs[i].state, uint8_t(byte));
      if (next == kNone || (then == utf8::kBoundary && next != target)) return false;
      const Pair pair{next, then};
      if (then != utf8::kBoundary && std::find(pairs.begin(), pairs.end(), pair) == pairs.end()) pairs.push_back(pair);
    }
  }
  return pairs.size() < 64;
}

// ---- vocabularies that cannot spell everything ----------------------------------------------------------------------

bool MaskTable::is_token(uint8_t byte) const {
  const uint32_t node = trie_->child_of_root(byte);
  return node != 0xffffffffu && trie_->node(node + 1).first_id > trie_->node(node).first_id;
}

// A state is live if it accepts, or a token leads from it to a live one. Tokens to others are not allowed.
//
// Single bytes, of which most are tokens, settle nearly every state; only for what they leave the trie is walked.
void MaskTable::find_live() {
  const auto states = size_t(num_states());
  std::vector<std::vector<int32_t>> sources(states);
  std::vector<uint8_t> live(states);
  const auto spread = [&] {
    std::vector<int32_t> open;
    for (size_t i = 0; i < states; ++i) {
      if (live[i] || automaton_.accepting[i]) open.push_back(int32_t(i));
    }
    while (!open.empty()) {
      const auto state = size_t(open.back());
      open.pop_back();
      live[state] = 1;
      for (const int32_t source : sources[state]) {
        if (!live[size_t(source)]) open.push_back(source);
      }
      sources[state].clear();
    }
    return std::find(live.begin(), live.end(), 0) == live.end();
  };
  std::vector<uint8_t> spelled(size_t(automaton_.num_classes));
  for (int byte = 0; byte < 256; ++byte) {
    if (is_token(uint8_t(byte))) spelled[automaton_.classes[size_t(byte)]] = 1;
  }
  for (int32_t state = 0; state < num_states(); ++state) {
    for (int32_t c = 0; c < automaton_.num_classes; ++c) {
      const int32_t target = automaton_.row(state)[c];
      if (target != kNone && spelled[size_t(c)]) sources[size_t(target)].push_back(state);
    }
  }
  if (spread()) return;
  for (auto& list : sources) list.clear();
  for (int32_t state = 0; state < num_states(); ++state) {
    if (live[size_t(state)]) continue;
    walk(state, 0, [&](const int32_t*, const int32_t*, int32_t next) {
      auto& list = sources[size_t(next)];
      if (list.empty() || list.back() != state) list.push_back(state);
      return true;
    });
  }
  if (!spread()) live_ = std::move(live);
}

}  // namespace sg
