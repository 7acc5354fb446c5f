# CUDA's runtime, linked statically: dijiang_cudart, and its headers for C++ files, DIJIANG_CUDA_INCLUDE. CMake's own
# FindCUDAToolkit asks for the shared library too, which pip's packages of the toolkit do not have under that name.
# For another kind of processor both come from DIJIANG_CUDA_TARGET, as its toolchain file says (aarch64.cmake).
if(DIJIANG_CUDA_TARGET)
    set(DIJIANG_CUDA_INCLUDE "${DIJIANG_CUDA_TARGET}/include" "${DIJIANG_CUDA_TARGET}/include/cccl")
    find_library(DIJIANG_CUDART cudart_static
        PATHS "${DIJIANG_CUDA_TARGET}" PATH_SUFFIXES lib lib64 NO_DEFAULT_PATH)
else()
    set(DIJIANG_CUDA_INCLUDE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    find_library(DIJIANG_CUDART cudart_static
        HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES}
        PATHS "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}" PATH_SUFFIXES lib64 lib)
endif()
if(NOT DIJIANG_CUDART)
    message(FATAL_ERROR "libcudart_static.a was not found in '${DIJIANG_CUDA_TARGET}' or beside ${CMAKE_CUDA_COMPILER}")
endif()
find_package(Threads REQUIRED)
add_library(dijiang_cudart INTERFACE)
target_link_libraries(dijiang_cudart INTERFACE "${DIJIANG_CUDART}" Threads::Threads ${CMAKE_DL_LIBS} rt)
