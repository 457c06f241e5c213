// Tests of the kernels, the pool and whole programs in plain C++: for processors that run no Python here (under an
// emulator), and under sanitizers.
//
//   native_test            every suite, on every instruction set of this processor
//   native_test levels     the instruction sets of this processor, the best first
//   native_test SUITE...   dense integers rows attention program pool grammar
#include <cstdio>
#include <functional>
#include <map>

#include "check.h"

namespace sg::test {

namespace {

int64_t num_checks = 0, num_failures = 0;
std::vector<std::string> scopes;

Tables available() {
  const Kernels* tables[kMostLevels];
  const int count = available_kernels(tables);
  return Tables(tables, tables + count);
}

const std::map<std::string, std::function<void(const Tables&)>> kSuites = {
    {"dense", test_dense},
    {"integers", test_integers},
    {"rows", test_rows},
    {"attention", test_attention},
    {"program", test_program},
    {"pool", [](const Tables&) { test_pool(); }},
    {"grammar", [](const Tables&) { test_grammar(); }},
};

int run(std::vector<std::string> names) {
  if (names == std::vector<std::string>{"levels"}) {
    for (const Kernels* kernels : available()) std::printf("%s\n", kernels->name);
    return 0;
  }
  if (names.empty())
    for (const auto& suite : kSuites) names.push_back(suite.first);
  for (const std::string& name : names) {
    const auto suite = kSuites.find(name);
    if (suite == kSuites.end()) {
      std::fprintf(stderr, "no suite is called %s\n", name.c_str());
      return 2;
    }
    const int64_t checks = num_checks, failures = num_failures;
    suite->second(available());
    std::printf("%s: %lld checks, %lld failures\n", name.c_str(), static_cast<long long>(num_checks - checks),
                static_cast<long long>(num_failures - failures));
    std::fflush(stdout);
    if (num_checks == checks) return 3;  // a suite that checks nothing is broken
  }
  return num_failures == 0 ? 0 : 1;
}

}  // namespace

void expect(bool is_right, const std::string& what) {
  num_checks++;
  if (is_right) return;
  if (++num_failures > 40) return;
  for (const std::string& scope : scopes) std::fprintf(stderr, "%s: ", scope.c_str());
  std::fprintf(stderr, "%s\n", what.c_str());
}

Scope::Scope(std::string name) { scopes.push_back(std::move(name)); }
Scope::~Scope() { scopes.pop_back(); }

}  // namespace sg::test

int main(int argc, char** argv) { return sg::test::run(std::vector<std::string>(argv + 1, argv + argc)); }
