#include "grammar/trie.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace sg {
namespace {

constexpr uint32_t kNone = 0xffffffffu;
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

int ascii_kind(uint8_t byte) {
  if (byte >= 'a' && byte <= 'z') return 0;
  if (byte >= 'A' && byte <= 'Z') return 1;
  if (byte >= '0' && byte <= '9') return 2;
  if (byte == '\t') return 3;
  if (byte == '\n') return 4;
  if (byte == '\r') return 5;
  if (byte < ' ' || byte == 0x7f) return 6;
  // Each mark for itself, the space among them.
  if (byte < '0') return 7 + (byte - ' ');
  if (byte < 'A') return 23 + (byte - ':');
  if (byte < 'a') return 30 + (byte - '[');
  return 36 + (byte - '{');
}

namespace utf8 {

uint8_t next(uint8_t state, uint8_t byte) {
  const auto in = [&](int low, int high, uint8_t then) { return byte >= low && byte <= high ? then : kInvalid; };
  switch (state) {
    case kBoundary:
      if (byte < 0x80) return kBoundary;
      if (byte == 0xc2) return 8;
      if (byte >= 0xc3 && byte <= 0xdf) return 1;
      if (byte == 0xe0) return 4;
      if (byte == 0xed) return 5;
      if (byte >= 0xe1 && byte <= 0xef) return 2;
      if (byte == 0xf0) return 6;
      if (byte == 0xf4) return 7;
      return in(0xf1, 0xf3, 3);
    case 1:  // one, two, three bytes are missing
      return in(0x80, 0xbf, kBoundary);
    case 2:
      return in(0x80, 0xbf, 1);
    case 3:
      return in(0x80, 0xbf, 2);
    case 4:  // after E0, ED, F0, F4: neither overlong, nor surrogates, nor beyond the last character
      return in(0xa0, 0xbf, 1);
    case 5:
      return in(0x80, 0x9f, 1);
    case 6:
      return in(0x90, 0xbf, 2);
    case 7:
      return in(0x80, 0x8f, 2);
    case 8:  // after C2
      return in(0xa0, 0xbf, kBoundary);
    default:
      return kInvalid;
  }
}

}  // namespace utf8

TokenTrie::TokenTrie(const std::vector<std::string_view>& tokens) {
  offsets_.reserve(tokens.size() + 1);
  for (const std::string_view token : tokens) {
    if (token.size() > 0xffff) throw std::invalid_argument("tokens: expected at most 65535 bytes each");
    offsets_.push_back(uint32_t(text_.size()));
    text_.append(token);
  }
  offsets_.push_back(uint32_t(text_.size()));
  root_.fill(kNone);
  std::vector<Open> open;  // the nodes from the root to the last one
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

void TokenTrie::add_nodes(std::string_view token, size_t shared, std::vector<Open>& open) {
  for (size_t depth = shared; depth < token.size(); ++depth) {
    const uint8_t byte = uint8_t(token[depth]), before = open.empty() ? utf8::kBoundary : open.back().utf8;
    const uint8_t after = utf8::next(before, byte);
    const bool is_ascii = before == utf8::kBoundary && byte < 0x80;
    const int kind = after == utf8::kInvalid ? kBroken : is_ascii ? ascii_kind(byte) : kMultibyte;
    if (depth == 0) root_[byte] = uint32_t(nodes_.size());
    open.push_back({uint32_t(nodes_.size()), after});
    nodes_.push_back({0, uint32_t(ids_.size()), uint16_t(depth + 1), byte});
    about_.push_back({0, 0, Kinds(kind), after == utf8::kBoundary});
  }
  max_depth_ = std::max(max_depth_, int32_t(token.size()));
}

void TokenTrie::close_nodes(std::vector<Open>& open, size_t depth) {
  while (open.size() > depth) {
    const uint32_t i = open.back().node;
    open.pop_back();
    nodes_[i].skip = uint32_t(nodes_.size());
    if (open.empty()) continue;
    About &own = about_[i], &above = about_[open.back().node];
    above.below |= own.below | Kinds(1) << own.kind;
    above.height = std::max<Kinds>(above.height, std::min<Kinds>(255, own.height + 1));
  }
}

int32_t TokenTrie::longest_token(std::string_view text) const {
  int32_t longest = -1;
  uint32_t i = text.empty() ? kNone : child_of_root(uint8_t(text[0]));
  for (size_t depth = 1; i != kNone; ++depth) {
    if (nodes_[i + 1].first_id > nodes_[i].first_id) longest = ids_[nodes_[i].first_id];
    if (depth == text.size()) break;
    const uint32_t end = nodes_[i].skip;
    for (++i; i < end && nodes_[i].byte != uint8_t(text[depth]);) i = nodes_[i].skip;
    if (i >= end) i = kNone;
  }
  return longest;
}

int64_t TokenTrie::bytes() const {
  return int64_t(nodes_.size() * (sizeof(Node) + sizeof(About)) + 4 * (ids_.size() + offsets_.size()) + text_.size());
}

std::shared_ptr<const TokenTrie::PlainTokens> TokenTrie::plain_tokens(Kinds kinds) const {
  const std::lock_guard<std::mutex> lock(plain_mutex_);
  if (std::shared_ptr<const PlainTokens> known = plain_[kinds].lock()) return known;
  auto plain = std::make_shared<PlainTokens>();
  auto& up_to = plain->up_to_;
  up_to.resize(1, std::vector<uint32_t>(size_t(mask_words(vocab()))));
  std::vector<int32_t> begun(size_t(max_depth_) + 1);  // characters, by depth
  std::vector<uint8_t> is_boundary(size_t(max_depth_) + 1, 1);
  for (uint32_t i = 0; i < uint32_t(num_nodes());) {
    const Node& node = nodes_[i];
    if (!(kinds >> about_[i].kind & 1)) {
      i = node.skip;
      continue;
    }
    const int32_t count = begun[node.depth - 1u] + is_boundary[node.depth - 1u];
    begun[node.depth] = count;
    is_boundary[node.depth] = about_[i].is_boundary;
    if (up_to.size() <= size_t(count)) up_to.resize(size_t(count) + 1, std::vector<uint32_t>(up_to[0].size()));
    for (uint32_t k = node.first_id; k < nodes_[i + 1].first_id; ++k) {
      up_to[size_t(count)][size_t(ids_[k]) / 32] |= 1u << (ids_[k] % 32);
    }
    ++i;
  }
  for (size_t n = 1; n < up_to.size(); ++n) {
    for (size_t w = 0; w < up_to[n].size(); ++w) up_to[n][w] |= up_to[n - 1][w];
  }
  plain_[kinds] = plain;
  return plain;
}

}  // namespace sg
