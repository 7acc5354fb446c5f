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

# nvcc's front end takes most of the time, once for each compute_*. What it makes of the first of a family runs on
# all of it, and becomes the same machine code there (nvcc 13.0, byte for byte): these sources only ask whether
# an architecture is 90, or newer. So a family is compiled from the first of it that is wanted; an architecture
# that leaves PTX in the library too is compiled from its own compute_*.
set(DIJIANG_FAMILIES "80-real 86-real 87-real 89-real" "100-real 101-real 103-real 110-real")

# The number of the compute_* that `architecture`, one of CMAKE_CUDA_ARCHITECTURES, is compiled from.
function(dijiang_front architecture result)
    foreach(family IN LISTS DIJIANG_FAMILIES)
        string(REPLACE " " ";" members "${family}")
        if(architecture IN_LIST members)
            foreach(member IN LISTS members)
                if(member IN_LIST CMAKE_CUDA_ARCHITECTURES)
                    set(architecture ${member})
                    break()
                endif()
            endforeach()
        endif()
    endforeach()
    string(REGEX REPLACE "-(real|virtual)$" "" front "${architecture}")
    set(${result} ${front} PARENT_SCOPE)
endfunction()

set(fronts "")  # and codes_<front>: what is made of each
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    dijiang_front(${architecture} front)
    string(REGEX REPLACE "-(real|virtual)$" "" number "${architecture}")
    list(APPEND fronts ${front})
    if(NOT architecture MATCHES "-virtual$")
        list(APPEND codes_${front} sm_${number})
    endif()
    if(NOT architecture MATCHES "-real$")
        list(APPEND codes_${front} compute_${number})
    endif()
endforeach()
list(REMOVE_DUPLICATES fronts)
set(DIJIANG_HOPPER_FLAGS "")  # for what sm_90a alone has; none if nobody wants 9.0
if("90" IN_LIST CMAKE_CUDA_ARCHITECTURES OR "90-real" IN_LIST CMAKE_CUDA_ARCHITECTURES)
    set(DIJIANG_HOPPER_FLAGS "${CMAKE_CUDA_FLAGS} --generate-code=arch=compute_90a,code=sm_90a")
endif()
foreach(front IN LISTS fronts)
    list(REMOVE_DUPLICATES codes_${front})
    list(JOIN codes_${front} "," codes)
    string(APPEND CMAKE_CUDA_FLAGS " --generate-code=arch=compute_${front},code=[${codes}]")
endforeach()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # of targets: the flags say it
