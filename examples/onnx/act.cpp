// Acts with a policy that `python scripts/export.py checkpoint=... out=policy.onnx` wrote, without Python.
//
//     ORT=/path/to/onnxruntime-linux-x64-VERSION      a release of onnxruntime, unpacked
//     g++ -O2 -std=c++17 act.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -Wl,-rpath,$ORT/lib -o act
//     ./act policy.onnx 0.1 -0.2 ...                  an observation; prints an action in the robot's bounds
//     ./act policy.onnx --zero 0.1 -0.2 ...           the same for zero noise (noise=input): always one action
//
// It accepts any file that export.py writes: an actor of any kind, alone or with candidates, with noise given here
// (noise=input) or drawn inside.

#include <onnxruntime_cxx_api.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

int main(int argc, char** argv) try {
  const bool zero = argc > 2 && !std::strcmp(argv[2], "--zero");
  if (argc < 3 + zero) {
    std::fprintf(stderr, "usage: %s policy.onnx [--zero] OBSERVATION...\n", argv[0]);
    return 2;
  }
  std::vector<float> observation;
  for (int i = 2 + zero; i < argc; ++i) observation.push_back(std::stof(argv[i]));

  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "act");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);  // a network this small is quickest on one
  Ort::Session session(env, argv[1], options);
  Ort::AllocatorWithDefaultOptions allocator;
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);

  // One observation: the free batch axis, -1, is 1.
  std::mt19937 generator(std::random_device{}());
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<std::string> names;
  std::vector<std::vector<int64_t>> shapes;
  std::vector<std::vector<float>> inputs;
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    names.emplace_back(session.GetInputNameAllocated(i, allocator).get());
    shapes.push_back(session.GetInputTypeInfo(i).GetTensorTypeAndShapeInfo().GetShape());
    int64_t size = 1;
    for (auto& length : shapes.back()) size *= length = length < 0 ? 1 : length;
    inputs.emplace_back(size);
    if (names.back() == "observation") {
      if (size != static_cast<int64_t>(observation.size())) {
        std::fprintf(stderr, "observation: expected %lld numbers, found %zu\n", static_cast<long long>(size),
                     observation.size());
        return 2;
      }
      inputs.back() = observation;
    }
  }

  if (zero && session.GetOutputCount() > 1) {
    std::fprintf(stderr, "--zero: expected a file with noise=input, found one that draws its own noise\n");
    return 2;
  }

  const auto act = [&] {
    std::vector<Ort::Value> values;
    std::vector<const char*> given;
    for (size_t i = 0; i < names.size(); ++i) {
      for (auto& x : inputs[i]) {  // new noise for every action
        if (names[i] == "noise") x = zero ? 0.0f : normal(generator);
        if (names[i] == "uniform") x = zero ? 0.5f : uniform(generator);
      }
      given.push_back(names[i].c_str());
      values.push_back(Ort::Value::CreateTensor<float>(memory, inputs[i].data(), inputs[i].size(),
                                                       shapes[i].data(), shapes[i].size()));
    }
    const char* output = "action";
    return session.Run(Ort::RunOptions{nullptr}, given.data(), values.data(), values.size(), &output, 1);
  };

  const auto action = act();
  const auto count = action[0].GetTensorTypeAndShapeInfo().GetElementCount();
  const float* numbers = action[0].GetTensorData<float>();
  for (size_t i = 0; i < count; ++i) std::printf("%.9g%s", numbers[i], i + 1 < count ? " " : "\n");

  const int repeats = 1000;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) act();
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  std::fprintf(stderr, "%.1f microseconds an action, mean of %d\n", took.count() / repeats, repeats);
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
