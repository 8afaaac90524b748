// Runs a problem's phases over PyTorch's thread pool.
#pragma once
#include "problem.h"

namespace attn_gate::cpu {

void run_forward(Problem p, const Layout& layout);
void run_apply(const Problem& p);
// The parameter gradients then lie in group 0 of p.partial, where the layout says.
void run_backward(Problem p, const Layout& layout, int64_t groups);
// The statistics of theta, in to.groups parts.
void run_statistics(const Problem& p, const Layout& layout, const Statistics& to);
void run_apply_backward(const Problem& p);
void run_gather_dphi(const Problem& p);

int64_t tiles_of(const Problem& p, const Layout& layout);
// How many independent partial sums the parameter gradients take: by the problem alone, not by the threads.
int64_t groups_of(const Problem& p, const Layout& layout);

}  // namespace attn_gate::cpu
