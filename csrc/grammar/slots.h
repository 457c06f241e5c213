// The grammars of the running sequences, by slot: where each one is after each of its output tokens.
//
// States are kept for every output token, so that a mask can be asked for any position (several drafts are verified in
// one step), and taking tokens back is a truncation. Changed between steps by one thread; masks are asked for during a
// step, by any number of threads.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "common/program.h"
#include "grammar/masks.h"

namespace sg {

// What a row may draw: all tokens, all but some, some, or those of a mask; `extra` may be drawn besides.
struct Allowed {
  enum class Kind { kAll, kAllBut, kIds, kWords };
  struct Ids {
    const int32_t* first = nullptr;
    int32_t count = 0;
    const int32_t* begin() const { return first; }
    const int32_t* end() const { return first + count; }
  };
  Kind kind = Kind::kAll;
  Ids ids;  // ascending
  const uint32_t* words = nullptr;
  Ids extra;   // ascending
  RowPtr row;  // what the above point into
};

// GrammarUse in streamgen/messages.py. All ids ascending.
struct GrammarUse {
  std::vector<int32_t> begins_after, opens_with;
  bool is_forced = false, repeats = false;
  std::vector<int32_t> held_ids;  // not allowed in free text: they would end it before the grammar is obeyed
  bool wants_runs = false;        // of forced tokens
};

class GrammarSlots {
 public:
  static constexpr int32_t kMostForced = 15;  // tokens at a time
  static constexpr int32_t kMostLikely = 16;

  explicit GrammarSlots(int32_t num_slots) : slots_(size_t(num_slots)) {}

  // A sequence takes the slot, with the output that it has already. False, and the slot is failed, if the grammar does
  // not allow that output.
  bool begin(int32_t slot, std::shared_ptr<const MaskTable> table, GrammarUse use, int32_t num_prompt,
             const std::vector<int32_t>& output);
  // One without a grammar does.
  void drop(int32_t slot);

  // Tokens to verify, the first at `position`. Those that were taken already are passed over.
  void propose(int32_t slot, int32_t position, const std::vector<int32_t>& ids);

  // A sequence's part of a step, for Python. `index` is its place in the plan.
  struct Turn {
    int32_t index;
    std::vector<int32_t> forced;
    bool ends;
    std::vector<int32_t> likely;
  };
  // Tokens that were drawn behind the end of a grammar do not count.
  struct Cut {
    int32_t index, num_kept;
  };
  struct Taken {
    std::vector<Turn> turns;
    std::vector<int32_t> faults;  // places in the plan
    std::vector<Cut> cuts;
  };
  // Take what a step drew: drawn[i] of rows[i]; places[i] is the sequence's place in the plan, or i where null. Forced
  // tokens are written into `tokens` [num_slots, stride] behind the last one. Of several rows of a sequence, which
  // verify drafts, those count that follow drafts which were drawn; `tokens` still holds the drafts.
  Taken take(const SampleRow* rows, int32_t num_rows, const int32_t* drawn, const int32_t* places, int32_t* tokens,
             int64_t stride);

  // What the token after `position` may be.
  Allowed allowed(int32_t slot, int32_t position) const;
  // The same as bits, [mask_words(vocab)] of the slot's table; false where everything is allowed, and nothing written.
  bool fill(int32_t slot, int32_t position, uint32_t* words) const;

  // Output tokens whose states are known, proposed ones included.
  int32_t num_known(int32_t slot) const { return int32_t(slots_.at(size_t(slot)).states.size()) - 1; }

 private:
  // States besides those of the automaton.
  static constexpr int32_t kDead = -1;     // after a token that was not allowed
  static constexpr int32_t kEnded = -2;    // nothing can follow
  static constexpr int32_t kFree = -3;     // free text
  static constexpr int32_t kFirst = -4;    // one of begins_after
  static constexpr int32_t kOpening = -5;  // one of opens_with, or the grammar's first
  static constexpr int32_t kAfter = -6;    // complete: it ends, or begins again

  struct Slot {
    std::shared_ptr<const MaskTable> table;  // null: no grammar
    GrammarUse use;
    std::vector<int32_t> again;  // begins_after and the stop ids, for kAfter
    int32_t num_prompt = 0;
    int32_t num_taken = 0;        // output tokens; what comes after them in `states` was proposed
    std::vector<int32_t> states;  // after 0, 1, ... output tokens
    bool has_failed = false;
  };

  static int32_t start_of(const Slot& s);
  static int32_t next(const Slot& s, int32_t state, int32_t token);
  static int32_t settled(const Slot& s, int32_t state);
  static bool is_loose(const Slot& s, int32_t state);
  static int32_t forced(const Slot& s, int32_t state);
  static bool ends(const Slot& s, int32_t state);
  static std::vector<int32_t> likely(const Slot& s, int32_t state);
  static void take_token(Slot& s, int32_t token, bool is_proposed);
  static std::vector<int32_t> run_on(Slot& s, int32_t position, int32_t* tokens, int64_t stride);
  void take_rows(const SampleRow* rows, int32_t first, int32_t last, const int32_t* drawn, int32_t place,
                 int32_t* tokens, int64_t stride, Taken& taken);

  std::vector<Slot> slots_;
};

}  // namespace sg
