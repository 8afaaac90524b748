// ATTN_GATE_BOX, which registers a function as TORCH_BOX does, but frees what its strings are handed over in.
//
// PyTorch's own conversion of them leaks 48 bytes each before 2.14
// (github.com/pytorch/pytorch/issues/191340). Worse, these lie between large results on the heap and keep the
// free ones from being joined: a loop of calls grew by a whole result each.
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>
#include <string_view>
#include <type_traits>

namespace attn_gate {

// How a parameter is handed over, and what is made of it.
template <class P>
struct Argument {
  static_assert(!std::is_convertible_v<P, std::string_view>, "strings are parameters of type std::string");
  using Type = P;
  static P take(P argument) { return static_cast<P&&>(argument); }
};
template <>
struct Argument<std::string> {
  using Type = StringHandle;
  static std::string take(StringHandle handle) {
    size_t length = 0;
    const char* data = nullptr;
    const bool read = torch_string_length(handle, &length) == AOTI_TORCH_SUCCESS &&
                      torch_string_c_str(handle, &data) == AOTI_TORCH_SUCCESS;
    const std::string text(read ? data : "", read ? length : 0);
    STD_TORCH_CHECK(torch_delete_string(handle) == AOTI_TORCH_SUCCESS && read,
                    "attn_gate: a string argument can't be read");
    return text;
  }
};

template <auto function>
struct Boxed;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static Result call(typename Argument<Parameters>::Type... arguments) {
    return function(Argument<Parameters>::take(arguments)...);
  }
};

}  // namespace attn_gate

#define ATTN_GATE_BOX(function) TORCH_BOX((&attn_gate::Boxed<function>::call))
