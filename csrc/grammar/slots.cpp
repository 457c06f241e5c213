#include "grammar/slots.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sg {
namespace {

bool holds(const std::vector<int32_t>& ids, int32_t id) { return std::binary_search(ids.begin(), ids.end(), id); }

Allowed::Ids ids_of(const std::vector<int32_t>& ids) { return {ids.data(), int32_t(ids.size())}; }

void sort_unique(std::vector<int32_t>& ids) {
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
}

}  // namespace

// ---- one sequence's way through its grammar -------------------------------------------------------------------------

int32_t GrammarSlots::start_of(const Slot& s) {
  if (s.use.begins_after.empty()) return 0;
  if (s.use.is_forced) return kFirst;
  return s.use.opens_with.empty() ? kFree : kOpening;
}

// Whether the grammar may be left here as if it had never been: it is complete, and free text may follow.
bool GrammarSlots::is_loose(const Slot& s, int32_t state) {
  return state >= 0 && s.use.repeats && s.table->may_stop(state);
}

int32_t GrammarSlots::settled(const Slot& s, int32_t state) {
  if (state < 0 || !s.use.repeats || !s.table->must_stop(state)) return state;
  return s.use.is_forced ? kAfter : kFree;
}

int32_t GrammarSlots::next(const Slot& s, int32_t state, int32_t token) {
  const MaskTable& table = *s.table;
  const bool begins = holds(s.use.begins_after, token);
  switch (state) {
    case kDead:
    case kEnded:
      return state;
    case kFree:
      return begins ? 0 : kFree;
    case kFirst:
      return begins ? 0 : kDead;
    case kAfter:
      return begins ? 0 : table.is_stop(token) ? kEnded : kDead;
    case kOpening:
      if (holds(s.use.opens_with, token)) return kFree;
      state = 0;
      break;
    default:
      break;
  }
  const bool loose = is_loose(s, state);
  if (loose && begins) return 0;
  if (table.is_stop(token)) {
    if (loose && !s.use.is_forced) return kFree;
    return table.may_stop(state) ? kEnded : kDead;
  }
  const int32_t after = table.next_token(state, token);
  if (after != MaskTable::kNone) return settled(s, after);
  if (loose && !s.use.is_forced) return kFree;
  return ends(s, state) ? kEnded : kDead;  // at the end a step is under way already: what it draws does not count
}

bool GrammarSlots::ends(const Slot& s, int32_t state) {
  return state == kEnded || (state >= 0 && !s.use.repeats && s.table->must_stop(state));
}

// The one token that may follow, or MaskTable::kNone.
int32_t GrammarSlots::forced(const Slot& s, int32_t state) {
  if (state == kFirst && s.use.begins_after.size() == 1) return s.use.begins_after.front();
  return state >= 0 ? s.table->forced_token(state) : MaskTable::kNone;
}

// Tokens that probably follow: two at least, as the first one is under way when anybody hears of it.
std::vector<int32_t> GrammarSlots::likely(const Slot& s, int32_t state) {
  if (state < 0 || is_loose(s, state)) return {};
  std::vector<int32_t> run = s.table->likely_run(state, kMostLikely);
  if (run.size() < 2) run.clear();
  return run;
}

// ---- slots ----------------------------------------------------------------------------------------------------------

bool GrammarSlots::begin(int32_t slot, std::shared_ptr<const MaskTable> table, GrammarUse use, int32_t num_prompt,
                         const std::vector<int32_t>& output) {
  for (const auto* ids : {&use.begins_after, &use.opens_with, &use.held_ids}) {
    for (const int32_t id : *ids) {
      if (id < 0 || id >= table->vocab()) throw std::invalid_argument("no token has the id " + std::to_string(id));
    }
  }
  Slot& s = slots_.at(size_t(slot));
  s = Slot{};
  s.table = std::move(table);
  s.use = std::move(use);
  sort_unique(s.use.begins_after);
  sort_unique(s.use.opens_with);
  sort_unique(s.use.held_ids);
  if (s.use.is_forced && s.use.repeats) {
    s.again = s.use.begins_after;
    s.again.insert(s.again.end(), s.table->stop_ids().begin(), s.table->stop_ids().end());
    sort_unique(s.again);
  }
  s.num_prompt = num_prompt;
  s.states.push_back(start_of(s));
  for (const int32_t token : output) s.states.push_back(next(s, s.states.back(), token));
  s.num_taken = int32_t(output.size());
  s.has_failed = s.states.back() == kDead;
  return !s.has_failed;
}

void GrammarSlots::drop(int32_t slot) { slots_.at(size_t(slot)) = Slot{}; }

void GrammarSlots::propose(int32_t slot, int32_t position, const std::vector<int32_t>& ids) {
  Slot& s = slots_.at(size_t(slot));
  if (s.table == nullptr) return;
  s.states.resize(size_t(s.num_taken) + 1);
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t output = int64_t(position) + int64_t(i) - s.num_prompt;
    if (output == int64_t(s.states.size()) - 1) s.states.push_back(next(s, s.states.back(), ids[i]));
  }
}

// The next token. What was proposed after it stays if it was proposed itself.
void GrammarSlots::take_token(Slot& s, int32_t token, bool is_proposed) {
  if (!is_proposed || int32_t(s.states.size()) == s.num_taken + 1) {
    s.states.resize(size_t(s.num_taken) + 1);
    s.states.push_back(next(s, s.states.back(), token));
  }
  s.num_taken++;
}

// Takes the tokens that are forced after `position`, and writes them there.
std::vector<int32_t> GrammarSlots::run_on(Slot& s, int32_t position, int32_t* tokens, int64_t stride) {
  std::vector<int32_t> run;
  while (int32_t(run.size()) < kMostForced && position + 1 < stride) {
    const int32_t token = forced(s, s.states.back());
    if (token == MaskTable::kNone) break;
    run.push_back(token);
    tokens[++position] = token;
    s.states.push_back(next(s, s.states.back(), token));
    s.num_taken++;
  }
  return run;
}

// The rows [first, last) of one sequence, in order.
void GrammarSlots::take_rows(const SampleRow* rows, int32_t first, int32_t last, const int32_t* drawn, int32_t place,
                             int32_t* tokens, int64_t stride, Taken& taken) {
  Slot& s = slots_[size_t(rows[first].slot)];
  if (s.has_failed) {
    taken.faults.push_back(place);
    return;
  }
  int32_t* own = tokens + rows[first].slot * stride;
  int32_t position = -1;  // of the last token that is new
  for (int32_t i = first; i < last; ++i) {
    const int32_t at = rows[i].position + 1, output = at - s.num_prompt;
    if (drawn[i] < 0 || output > s.num_taken) break;
    const bool comes_true = i + 1 < last && own[at] == drawn[i];  // the draft there
    if (output == s.num_taken) {                                  // else it was forced, and taken before
      take_token(s, drawn[i], comes_true);
      position = at;
      if (ends(s, s.states[size_t(s.num_taken)]) && i + 1 < last) {
        taken.cuts.push_back({place, i + 1 - first});
        break;
      }
    }
    if (!comes_true) break;
  }
  s.states.resize(size_t(s.num_taken) + 1);
  if (position < 0) return;
  if (s.states.back() == kDead) {
    s.has_failed = true;
    taken.faults.push_back(place);
    return;
  }
  Turn turn{place, {}, false, {}};
  if (s.use.wants_runs) turn.forced = run_on(s, position, own, stride);
  turn.ends = ends(s, s.states.back());
  if (!turn.ends) turn.likely = likely(s, s.states.back());
  if (turn.ends || !turn.forced.empty() || !turn.likely.empty()) taken.turns.push_back(std::move(turn));
}

GrammarSlots::Taken GrammarSlots::take(const SampleRow* rows, int32_t num_rows, const int32_t* drawn,
                                       const int32_t* places, int32_t* tokens, int64_t stride) {
  Taken taken;
  for (int32_t first = 0; first < num_rows;) {
    const auto is_of_the_same = [&](int32_t i) { return rows[i].slot == rows[first].slot && rows[i].target < 0; };
    int32_t last = first + 1;
    if (rows[first].target < 0 && slots_.at(size_t(rows[first].slot)).table != nullptr) {
      while (last < num_rows && is_of_the_same(last)) ++last;
      take_rows(rows, first, last, drawn, places == nullptr ? first : places[first], tokens, stride, taken);
    }
    first = last;
  }
  return taken;
}

// ---- masks ----------------------------------------------------------------------------------------------------------

Allowed GrammarSlots::allowed(int32_t slot, int32_t position) const {
  const Slot& s = slots_[size_t(slot)];
  Allowed allowed;
  const int64_t output = int64_t(position) + 1 - s.num_prompt;
  if (s.table == nullptr || s.has_failed || output < 0 || output >= int64_t(s.states.size())) return allowed;
  int32_t state = s.states[size_t(output)];
  if (is_loose(s, state) && !s.use.is_forced) return allowed;
  switch (state) {
    case kDead:
    case kEnded:
      return allowed;
    case kFree:
      if (!s.use.repeats && !s.use.held_ids.empty()) {
        allowed.kind = Allowed::Kind::kAllBut;
        allowed.ids = ids_of(s.use.held_ids);
      }
      return allowed;
    case kFirst:
      allowed.kind = Allowed::Kind::kIds;
      allowed.ids = ids_of(s.use.begins_after);
      return allowed;
    case kAfter:
      allowed.kind = Allowed::Kind::kIds;
      allowed.ids = ids_of(s.again);
      return allowed;
    case kOpening:
      allowed.extra = ids_of(s.use.opens_with);
      state = 0;
      break;
    default:
      if (is_loose(s, state)) allowed.extra = ids_of(s.use.begins_after);
      break;
  }
  allowed.row = s.table->row(state);
  const bool is_dense = allowed.row->kind == MaskRow::Kind::kDense;
  allowed.kind = is_dense ? Allowed::Kind::kWords : Allowed::Kind::kIds;
  allowed.ids = ids_of(allowed.row->ids);
  allowed.words = allowed.row->words.data();
  return allowed;
}

bool GrammarSlots::fill(int32_t slot, int32_t position, uint32_t* words) const {
  const Allowed a = allowed(slot, position);
  if (a.kind == Allowed::Kind::kAll) return false;
  const int64_t count = mask_words(slots_[size_t(slot)].table->vocab());
  const auto bit = [](int32_t id) { return 1u << (id % 32); };
  if (a.kind == Allowed::Kind::kWords) {
    std::copy(a.words, a.words + count, words);
  } else {
    std::fill(words, words + count, a.kind == Allowed::Kind::kAllBut ? 0xffffffffu : 0u);
  }
  for (const int32_t id : a.ids) {
    if (a.kind == Allowed::Kind::kAllBut) words[id / 32] &= ~bit(id);
    if (a.kind == Allowed::Kind::kIds) words[id / 32] |= bit(id);
  }
  for (const int32_t id : a.extra) words[id / 32] |= bit(id);
  return true;
}

}  // namespace sg
