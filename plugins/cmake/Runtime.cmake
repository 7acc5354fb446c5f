# CUDA's runtime, linked statically: dijiang_cudart, and its headers for C++ files, DIJIANG_CUDA_INCLUDE. CMake's own
# FindCUDAToolkit asks for the shared library too, which pip's packages of the toolkit do not have under that name.
set(DIJIANG_CUDA_INCLUDE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
find_library(DIJIANG_CUDART cudart_static
    HINTS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES}
    PATHS "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}" PATH_SUFFIXES lib64 lib)
if(NOT DIJIANG_CUDART)
    message(FATAL_ERROR "libcudart_static.a was not found beside ${CMAKE_CUDA_COMPILER}")
endif()
find_package(Threads REQUIRED)
add_library(dijiang_cudart INTERFACE)
target_link_libraries(dijiang_cudart INTERFACE "${DIJIANG_CUDART}" Threads::Threads ${CMAKE_DL_LIBS} rt)
