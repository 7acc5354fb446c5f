# GPU architectures: by default every one that is tuned for and that this nvcc knows, each as machine code, and
# the newest also as PTX, which the driver of a GPU that is newer still compiles when the library is loaded.
# 80 A100, 87 Jetson Orin, 89 L4/L40/RTX 40, 90 H100/H200, 100 B200, 110 Jetson Thor (101 before CUDA 13), 120 RTX 50.
set(DIJIANG_TUNED_ARCHITECTURES 80 87 89 90 100 110 120)

set(choose_architectures OFF)
if("${CMAKE_CUDA_ARCHITECTURES}" STREQUAL "")
    set(choose_architectures ON)
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # for CMake's trial of the compiler
endif()
enable_language(CUDA)

if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
    message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} is CUDA ${CMAKE_CUDA_COMPILER_VERSION}; 12.0 or newer is needed")
endif()

if(choose_architectures)
    execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code
        OUTPUT_VARIABLE known RESULT_VARIABLE status ERROR_QUIET)
    if(NOT status EQUAL 0)
        message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} --list-gpu-code failed")
    endif()
    string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
    set(CMAKE_CUDA_ARCHITECTURES "")
    foreach(architecture IN LISTS DIJIANG_TUNED_ARCHITECTURES)
        if("sm_${architecture}" IN_LIST known)
            list(APPEND CMAKE_CUDA_ARCHITECTURES ${architecture}-real)
        endif()
    endforeach()
    if(NOT CMAKE_CUDA_ARCHITECTURES)
        message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} knows none of ${DIJIANG_TUNED_ARCHITECTURES}, but ${known}")
    endif()
    list(POP_BACK CMAKE_CUDA_ARCHITECTURES newest)
    string(REPLACE "-real" "" newest "${newest}")
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest})  # without a suffix: machine code and PTX
endif()

# The same in the words of dijiang_architectures(): "sm_80 sm_90 compute_90".
set(DIJIANG_ARCHITECTURES "")
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(NOT architecture MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
        message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES: '${architecture}' is not like 87, 87-real or 87-virtual")
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-virtual")
        list(APPEND DIJIANG_ARCHITECTURES sm_${CMAKE_MATCH_1})
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-real")
        list(APPEND DIJIANG_ARCHITECTURES compute_${CMAKE_MATCH_1})
    endif()
endforeach()
list(JOIN DIJIANG_ARCHITECTURES " " DIJIANG_ARCHITECTURES)
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${DIJIANG_ARCHITECTURES}")
