// The tokens of a vocabulary as a trie of bytes, in preorder: a subtree is a stretch of nodes, and its tokens are a
// stretch of ids.
//
// Walking it with the state of an automaton per depth finds the tokens that the automaton allows; a byte that leads
// nowhere skips a subtree. Within strings of JSON nearly everything is allowed, and a subtree of which all bytes leave
// the state as it is need not be walked either: `below` tells which groups of bytes there are.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace sg {

// Bytes that automata of text seldom tell apart, as a bit for each group.
using ByteGroups = uint64_t;
constexpr int kByteGroups = 48;
const std::array<uint8_t, 256>& byte_groups();
inline ByteGroups group_bit(uint8_t byte) { return ByteGroups(1) << byte_groups()[byte]; }

// One bit for each id.
inline int64_t mask_words(int32_t vocab) { return (int64_t(vocab) + 31) / 32; }

class TokenTrie {
 public:
  struct Node {
    uint32_t skip;      // the first node behind its subtree
    uint32_t first_id;  // of `ids`: its own come first, then those of its subtree
    uint16_t depth;     // bytes from the root, 1 for the root's children
    uint8_t byte;
  };

  // tokens[id]; an empty one is never matched. Throws std::invalid_argument for one of more than 65,535 bytes.
  explicit TokenTrie(const std::vector<std::string_view>& tokens);

  int32_t vocab() const { return int32_t(offsets_.size()) - 1; }
  int32_t num_nodes() const { return int32_t(nodes_.size()) - 1; }
  int32_t max_depth() const { return max_depth_; }
  int64_t bytes() const;

  const Node& node(uint32_t i) const { return nodes_[i]; }
  // Groups of bytes below the node, its own byte not among them.
  ByteGroups below(uint32_t i) const { return below_[i]; }
  // Ids of the node alone end where those of the next begin; ids of its subtree where those of nodes[skip] do.
  const int32_t* ids() const { return ids_.data(); }
  // The root's child with that byte, or 0xffffffff.
  uint32_t child_of_root(uint8_t byte) const { return root_[byte]; }
  std::string_view token(int32_t id) const {
    return std::string_view(text_).substr(offsets_[size_t(id)], offsets_[size_t(id) + 1] - offsets_[size_t(id)]);
  }

  // The tokens all of whose bytes are in `groups`: [mask_words(vocab)] words. Kept for the few groups that there are.
  std::shared_ptr<const std::vector<uint32_t>> plain_tokens(ByteGroups groups) const;

 private:
  void add_nodes(std::string_view token, size_t shared, std::vector<uint32_t>& open);
  void close_nodes(std::vector<uint32_t>& open, size_t depth);

  std::string text_;  // of all tokens, by id
  std::vector<uint32_t> offsets_;
  std::vector<Node> nodes_;  // and one at the end
  std::vector<ByteGroups> below_;
  std::vector<int32_t> ids_;
  std::array<uint32_t, 256> root_;
  int32_t max_depth_ = 0;
  mutable std::mutex plain_mutex_;
  mutable std::map<ByteGroups, std::shared_ptr<const std::vector<uint32_t>>> plain_;
};

}  // namespace sg
