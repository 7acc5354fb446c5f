# Toolchain file: compile for 64-bit Arm (a Jetson, a server) on another kind of processor.
#
#   cmake -S plugins -B build/plugin-aarch64 --toolchain cmake/aarch64.cmake -DDIJIANG_CUDA_TARGET=/folder
#
#   DIJIANG_CUDA_TARGET   CUDA for aarch64, of nvcc's version: a folder with include/ and lib/libcudart_static.a,
#                         such as /usr/local/cuda/targets/sbsa-linux, or nvidia/cu13 of pip's aarch64 wheels
#   DIJIANG_CXX           the cross compiler                       default: aarch64-linux-gnu-g++
#   DIJIANG_NVCC          this machine's nvcc                      default: $CUDACXX, or nvcc in $PATH
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES DIJIANG_CUDA_TARGET DIJIANG_CXX DIJIANG_CROSS_CUDA)

if(NOT DIJIANG_CXX)
    set(DIJIANG_CXX aarch64-linux-gnu-g++)
endif()
set(CMAKE_CXX_COMPILER "${DIJIANG_CXX}")
set(CMAKE_CUDA_HOST_COMPILER "${DIJIANG_CXX}")

# nvcc takes headers and libraries from targets/<name> beside the folder that it was started from, links not
# followed. So it gets a toolkit of links, with this machine's programs and the other's target.
if(NOT DIJIANG_CROSS_CUDA)
    if(NOT EXISTS "${DIJIANG_CUDA_TARGET}/include/cuda_runtime_api.h")
        message(FATAL_ERROR "DIJIANG_CUDA_TARGET: '${DIJIANG_CUDA_TARGET}' has no include/cuda_runtime_api.h")
    endif()
    if(NOT DIJIANG_NVCC)
        find_program(DIJIANG_NVCC nvcc HINTS "$ENV{CUDACXX}/.." "$ENV{CUDA_HOME}/bin" /usr/local/cuda/bin REQUIRED)
    endif()
    # It may be a script around the program, which itself knows where it is.
    execute_process(COMMAND "${DIJIANG_NVCC}" --dryrun -x cu -c /dev/null
        OUTPUT_QUIET ERROR_VARIABLE said)
    if(NOT said MATCHES "_HERE_=([^\n]+)")
        message(FATAL_ERROR "${DIJIANG_NVCC} does not say where it is\n${said}")
    endif()
    get_filename_component(programs "${CMAKE_MATCH_1}" REALPATH)
    set(DIJIANG_CROSS_CUDA "${CMAKE_BINARY_DIR}/cuda-aarch64")
    file(MAKE_DIRECTORY "${DIJIANG_CROSS_CUDA}/bin" "${DIJIANG_CROSS_CUDA}/targets")
    file(GLOB names RELATIVE "${programs}" "${programs}/*")
    foreach(name IN LISTS names)
        file(CREATE_LINK "${programs}/${name}" "${DIJIANG_CROSS_CUDA}/bin/${name}" SYMBOLIC)
    endforeach()
    file(CREATE_LINK "${programs}/../nvvm" "${DIJIANG_CROSS_CUDA}/nvvm" SYMBOLIC)
    get_filename_component(target "${DIJIANG_CUDA_TARGET}" REALPATH)
    file(CREATE_LINK "${target}" "${DIJIANG_CROSS_CUDA}/targets/aarch64-linux" SYMBOLIC)
endif()
set(CMAKE_CUDA_COMPILER "${DIJIANG_CROSS_CUDA}/bin/nvcc")
set(CMAKE_CUDA_FLAGS_INIT "--target-directory=aarch64-linux")
