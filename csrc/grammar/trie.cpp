#include "grammar/trie.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace sg {
namespace {

constexpr uint32_t kNone = 0xffffffffu;
constexpr size_t kMostPlain = 16;  // sets of groups whose tokens are kept; automata of text have one or two

std::array<uint8_t, 256> make_groups() {
  std::array<uint8_t, 256> group{};
  uint8_t next = 4;
  for (int b = 0; b < 256; ++b) {
    uint8_t& g = group[size_t(b)];
    if (b >= 'a' && b <= 'z') {
      g = 0;
    } else if (b >= 'A' && b <= 'Z') {
      g = 1;
    } else if (b >= '0' && b <= '9') {
      g = 2;
    } else if (b == ' ') {
      g = 3;
    } else if (b > ' ' && b < 0x7f) {
      g = next++;  // each mark for itself: 32 of them
    } else if (b == '\t' || b == '\n' || b == '\r') {
      g = uint8_t(b == '\t' ? 36 : b == '\n' ? 37 : 38);
    } else if (b < ' ' || b == 0x7f) {
      g = 39;
    } else if (b < 0xc0) {
      g = uint8_t(b < 0x90 ? 40 : b < 0xa0 ? 41 : 42);
    } else {
      g = uint8_t(b < 0xe0 ? 43 : b < 0xf0 ? 44 : 45);
    }
  }
  return group;
}

// Order of the bytes, of equal tokens the lower id first.
struct Key {
  uint64_t head;  // the first 8 bytes, the first of all on top
  int32_t id;
};

std::vector<Key> sorted_keys(const std::vector<std::string_view>& tokens) {
  std::vector<Key> keys;
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (tokens[id].empty()) continue;
    uint64_t head = 0;
    for (size_t i = 0; i < 8; ++i) head = head << 8 | (i < tokens[id].size() ? uint8_t(tokens[id][i]) : 0u);
    keys.push_back({head, int32_t(id)});
  }
  std::sort(keys.begin(), keys.end(), [&](const Key& a, const Key& b) {
    if (a.head != b.head) return a.head < b.head;
    const int order = tokens[size_t(a.id)].compare(tokens[size_t(b.id)]);  // as unsigned bytes
    return order != 0 ? order < 0 : a.id < b.id;
  });
  return keys;
}

}  // namespace

const std::array<uint8_t, 256>& byte_groups() {
  static const std::array<uint8_t, 256> groups = make_groups();
  return groups;
}

TokenTrie::TokenTrie(const std::vector<std::string_view>& tokens) {
  offsets_.reserve(tokens.size() + 1);
  for (const std::string_view token : tokens) {
    if (token.size() > 0xffff) throw std::invalid_argument("tokens: expected at most 65535 bytes each");
    offsets_.push_back(uint32_t(text_.size()));
    text_.append(token);
  }
  offsets_.push_back(uint32_t(text_.size()));
  root_.fill(kNone);
  std::vector<uint32_t> open;  // the nodes from the root to the last one
  std::string_view last;
  for (const Key& key : sorted_keys(tokens)) {
    const std::string_view text = token(key.id);
    const size_t most = std::min(text.size(), last.size());
    size_t shared = 0;
    while (shared < most && text[shared] == last[shared]) ++shared;
    close_nodes(open, shared);
    add_nodes(text, shared, open);
    ids_.push_back(key.id);
    last = text;
  }
  close_nodes(open, 0);
  nodes_.push_back({uint32_t(nodes_.size()), uint32_t(ids_.size()), 0, 0});
}

void TokenTrie::add_nodes(std::string_view token, size_t shared, std::vector<uint32_t>& open) {
  for (size_t depth = shared; depth < token.size(); ++depth) {
    const uint8_t byte = uint8_t(token[depth]);
    if (depth == 0) root_[byte] = uint32_t(nodes_.size());
    open.push_back(uint32_t(nodes_.size()));
    nodes_.push_back({0, uint32_t(ids_.size()), uint16_t(depth + 1), byte});
    below_.push_back(0);
  }
  max_depth_ = std::max(max_depth_, int32_t(token.size()));
}

void TokenTrie::close_nodes(std::vector<uint32_t>& open, size_t depth) {
  while (open.size() > depth) {
    const uint32_t i = open.back();
    open.pop_back();
    nodes_[i].skip = uint32_t(nodes_.size());
    if (!open.empty()) below_[open.back()] |= below_[i] | group_bit(nodes_[i].byte);
  }
}

int64_t TokenTrie::bytes() const {
  return int64_t(nodes_.size() * (sizeof(Node) + sizeof(ByteGroups)) + 4 * (ids_.size() + offsets_.size()) +
                 text_.size());
}

std::shared_ptr<const std::vector<uint32_t>> TokenTrie::plain_tokens(ByteGroups groups) const {
  const std::lock_guard<std::mutex> lock(plain_mutex_);
  const auto known = plain_.find(groups);
  if (known != plain_.end()) return known->second;
  auto words = std::make_shared<std::vector<uint32_t>>(size_t(mask_words(vocab())));
  for (uint32_t i = 0; i < uint32_t(num_nodes());) {
    const bool is_plain = group_bit(nodes_[i].byte) & groups;
    const uint32_t next = is_plain ? i + 1 : nodes_[i].skip;
    const uint32_t end = is_plain ? nodes_[i + 1].first_id : nodes_[i].first_id;
    for (uint32_t k = nodes_[i].first_id; k < end; ++k) (*words)[size_t(ids_[k]) / 32] |= 1u << (ids_[k] % 32);
    i = next;
  }
  if (plain_.size() >= kMostPlain) plain_.clear();
  plain_[groups] = words;
  return words;
}

}  // namespace sg
