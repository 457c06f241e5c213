// The tokens of a vocabulary as a trie of bytes, in preorder: a subtree is a stretch of nodes, and its tokens are a
// stretch of ids.
//
// Walking it with the state of an automaton per depth finds the tokens that the automaton allows; a byte that leads
// nowhere skips a subtree. Within text nearly everything is allowed, and a subtree need not be walked whose characters
// are all of kinds that the automaton does not tell apart. So the kinds of characters in each subtree are known.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace sg {

// Kinds of characters that automata of text seldom tell apart, a bit for each: letters, digits, each mark ...
using Kinds = uint64_t;
constexpr int kAsciiKinds = 40;
constexpr int kMultibyte = 40;  // a character from U+00A0 on, or the beginning of one
constexpr int kBroken = 41;     // bytes that are no UTF-8, or U+0080 to U+009F
constexpr Kinds kAllKinds = (Kinds(1) << 42) - 1;
int ascii_kind(uint8_t byte);  // byte < 0x80

// UTF-8, one byte after the other, without U+0080 to U+009F.
namespace utf8 {
constexpr uint8_t kBoundary = 0, kInvalid = 9, kStates = 10;
uint8_t next(uint8_t state, uint8_t byte);
}  // namespace utf8

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

  // What a subtree holds, as far as its bytes go on as UTF-8 from the root.
  struct About {
    Kinds below : 42;       // kinds of the characters below the node; it may stand within one itself
    Kinds height : 8;       // bytes of the longest way down; 255 is 255 or more
    Kinds kind : 8;         // of the character that its byte belongs to
    Kinds is_boundary : 1;  // a character ends with its byte
  };

  // tokens[id]; an empty one is never matched. Throws std::invalid_argument for one of more than 65,535 bytes.
  explicit TokenTrie(const std::vector<std::string_view>& tokens);

  int32_t vocab() const { return int32_t(offsets_.size()) - 1; }
  int32_t num_nodes() const { return int32_t(nodes_.size()) - 1; }
  int32_t max_depth() const { return max_depth_; }
  int64_t bytes() const;

  const Node& node(uint32_t i) const { return nodes_[i]; }
  const About& about(uint32_t i) const { return about_[i]; }
  // Ids of the node alone end where those of the next begin; ids of its subtree where those of nodes[skip] do.
  const int32_t* ids() const { return ids_.data(); }
  // The root's child with that byte, or 0xffffffff.
  uint32_t child_of_root(uint8_t byte) const { return root_[byte]; }
  std::string_view token(int32_t id) const {
    return std::string_view(text_).substr(offsets_[size_t(id)], offsets_[size_t(id) + 1] - offsets_[size_t(id)]);
  }

  // The longest token that `text` begins with, or -1.
  int32_t longest_token(std::string_view text) const;

  // The tokens whose characters are all of some kinds, by how many they begin: bits of those with n at most.
  class PlainTokens {
   public:
    const std::vector<uint32_t>& at_most(int32_t n) const { return up_to_[std::min(size_t(n), up_to_.size() - 1)]; }

   private:
    friend class TokenTrie;
    std::vector<std::vector<uint32_t>> up_to_;  // [longest + 1][mask_words(vocab)]
  };
  // Made once, as long as somebody has them.
  std::shared_ptr<const PlainTokens> plain_tokens(Kinds kinds) const;

 private:
  struct Open {
    uint32_t node;
    uint8_t utf8;  // state after its byte
  };
  void add_nodes(std::string_view token, size_t shared, std::vector<Open>& open);
  void close_nodes(std::vector<Open>& open, size_t depth);

  std::string text_;  // of all tokens, by id
  std::vector<uint32_t> offsets_;
  std::vector<Node> nodes_;  // and one at the end
  std::vector<About> about_;
  std::vector<int32_t> ids_;
  std::array<uint32_t, 256> root_;
  int32_t max_depth_ = 0;
  mutable std::mutex plain_mutex_;
  mutable std::map<Kinds, std::weak_ptr<const PlainTokens>> plain_;
};

}  // namespace sg
