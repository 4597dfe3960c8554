// Findings, as lines of text: kind, address in the kernel's library, line, message, separated by
// tabs. The caller maps addresses to source lines.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <set>
#include <utility>

#include "state.h"

namespace runtime {

constexpr size_t kMaxFindings = 40;

static std::string findings;
static size_t count;
static std::set<std::pair<void*, std::string>> seen;

void clear_findings() {
  findings.clear();
  count = 0;
  seen.clear();
}

// Offset in the library, for addr2line.
static uintptr_t offset_of(void* pc) {
  Dl_info info;
  if (pc == nullptr || dladdr(pc, &info) == 0) {
    return 0;
  }
  return static_cast<char*>(pc) - static_cast<char*>(info.dli_fbase);
}

static void append(const char* kind, const std::string& place, int line, const char* message) {
  findings += kind;
  findings += '\t' + place + '\t' + std::to_string(line) + '\t' + message + '\n';
  ++count;
}

static std::string hexadecimal(uintptr_t value) {
  char text[24];
  snprintf(text, sizeof text, "%zx", static_cast<size_t>(value));
  return text;
}

void report(void* pc, int line, const char* format, ...) {
  // The same defect at the same place is one finding, whichever thread causes it.
  const bool fresh = seen.insert({pc, pc ? format : format + std::to_string(line)}).second;
  if (!fresh || count >= kMaxFindings) {
    return;
  }
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  append("finding", hexadecimal(offset_of(pc)), line, message);
}

static std::string path_of(const Fiber& fiber) {
  std::string path;
  for (int i = 0; i < fiber.depth && i < kMaxCallDepth; ++i) {
    path += (i ? "," : "") + hexadecimal(offset_of(fiber.frames[i].caller));
  }
  return path;
}

void report_if_paths_differ(const Fiber& a, const Fiber& b, int line, const char* message) {
  const bool fresh = seen.insert({nullptr, message + std::to_string(line)}).second;
  if (fresh && count < kMaxFindings) {
    append("paths", path_of(a) + "|" + path_of(b), line, message);
  }
}

extern "C" const char* mtl_findings() {
  return findings.c_str();
}

}  // namespace runtime
