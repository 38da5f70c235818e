// A compiled program that is run without the interpreter's lock, so that Python's other threads go on meanwhile, and several
// of them may run it at the same time.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <string>
#include <vector>

namespace sidrec {
namespace {

class Package : public torch::CustomClassHolder {
 public:
  Package(const std::string& path, int64_t runners) : loader_(path, "model", false, static_cast<size_t>(runners)) {}

  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) { return loader_.run(inputs); }

  // Of a key; empty if there is none.
  std::string metadata(const std::string& key) {
    const auto all = loader_.get_metadata();
    const auto found = all.find(key);
    return found == all.end() ? "" : found->second;
  }

 private:
  torch::inductor::AOTIModelPackageLoader loader_;
};

} // namespace

TORCH_LIBRARY_FRAGMENT(sidrec_native, m) {
  m.class_<Package>("Package")
      .def(torch::init<std::string, int64_t>())
      .def("run", [](const c10::intrusive_ptr<Package>& self, std::vector<at::Tensor> inputs) { return self->run(inputs); })
      .def("metadata", [](const c10::intrusive_ptr<Package>& self, std::string key) { return self->metadata(key); });
}

} // namespace sidrec
