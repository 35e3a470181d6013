// One call per worker, on OpenMP's threads: the pool that torch uses too.
#pragma once

#include <exception>

namespace plum::cpu {

// Calls body(worker) for worker in [0, workers); rethrows the first exception.
template <typename Body>
void parallel(int workers, const Body& body) {
  // A team of one costs a third of a microsecond.
  if (workers == 1) return body(0);
  std::exception_ptr error;
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int worker = 0; worker < workers; ++worker) {
    try {
      body(worker);
    } catch (...) {
#pragma omp critical(plum_parallel_error)
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace plum::cpu
