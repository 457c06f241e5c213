// The part of streamgen._cpu that is about grammars; see bind.cpp.
#pragma once
#include <nanobind/nanobind.h>

namespace sg {

void bind_grammar(nanobind::module_& m);

}  // namespace sg
