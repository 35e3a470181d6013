// How the elements of rows are stored.
#pragma once

namespace plum::cpu {

enum class RowType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

}  // namespace plum::cpu
