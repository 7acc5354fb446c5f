#pragma once
namespace dijiang {
inline int opaque(int x) { return x; }
}  // namespace dijiang
