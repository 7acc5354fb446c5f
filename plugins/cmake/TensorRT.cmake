# The TensorRT plugin: the shell that fits the version of the headers, around the kernels.

# `prefix`_MAJOR, _MINOR, _PATCH of the TensorRT whose headers are in `folder`. The macros changed from numbers to
# names of other macros in 10.x: let the compiler resolve them.
function(dijiang_tensorrt_version folder prefix)
    if(NOT EXISTS "${folder}/NvInferVersion.h" OR NOT EXISTS "${folder}/NvInfer.h")
        message(FATAL_ERROR "TENSORRT_INCLUDE: there is no NvInfer.h with its NvInferVersion.h in ${folder}")
    endif()
    set(probe "${CMAKE_BINARY_DIR}/tensorrt_version.cpp")
    file(WRITE "${probe}"
        "#include <NvInferVersion.h>\ntensorrt = NV_TENSORRT_MAJOR.NV_TENSORRT_MINOR.NV_TENSORRT_PATCH;\n")
    execute_process(COMMAND "${CMAKE_CXX_COMPILER}" -E -P "-I${folder}" "${probe}"
        OUTPUT_VARIABLE said ERROR_VARIABLE error)
    if(NOT said MATCHES "tensorrt = ([0-9]+) ?\\. ?([0-9]+) ?\\. ?([0-9]+)")
        message(FATAL_ERROR "${folder}/NvInferVersion.h does not say which TensorRT it is of\n${error}")
    endif()
    set(${prefix}_MAJOR ${CMAKE_MATCH_1} PARENT_SCOPE)
    set(${prefix}_MINOR ${CMAKE_MATCH_2} PARENT_SCOPE)
    set(${prefix}_PATCH ${CMAKE_MATCH_3} PARENT_SCOPE)
endfunction()

function(dijiang_tensorrt_plugin folder)
    dijiang_tensorrt_version("${folder}" TENSORRT)
    set(version "${TENSORRT_MAJOR}.${TENSORRT_MINOR}.${TENSORRT_PATCH}")
    if(TENSORRT_MAJOR EQUAL 8 AND TENSORRT_MINOR GREATER_EQUAL 6)
        set(shell v2)  # IPluginV2DynamicExt
    elseif(version VERSION_GREATER_EQUAL 10.3)
        set(shell v3)  # IPluginV3
    else()
        message(FATAL_ERROR "${folder} is of TensorRT ${version}; the plugin needs 8.6, or 10.3 or newer")
    endif()
    file(GLOB sources CONFIGURE_DEPENDS tensorrt/common/*.cpp tensorrt/attention/*.cpp
        tensorrt/linear/*.cpp tensorrt/step/*.cpp tensorrt/${shell}/*.cpp)
    if(NOT sources)
        message(FATAL_ERROR "there is no plugin in ${CMAKE_CURRENT_SOURCE_DIR}/tensorrt/${shell}")
    endif()
    message(STATUS "TensorRT ${version} (${shell}) in ${folder}")

    set(name dijiang_tensorrt_${TENSORRT_MAJOR})
    list(LENGTH TENSORRT_INCLUDE count)
    if(count EQUAL 1)
        set(target ${name})
        set(output "${CMAKE_BINARY_DIR}")
    else()
        set(target dijiang_tensorrt_${version})
        set(output "${CMAKE_BINARY_DIR}/tensorrt-${version}")
    endif()
    dijiang_shared_library(${target} exports/tensorrt.map ${sources})
    target_include_directories(${target} PRIVATE include tensorrt kernels)
    # As system headers: NVIDIA's own warnings are not ours.
    target_include_directories(${target} SYSTEM PRIVATE "${folder}" ${DIJIANG_CUDA_INCLUDE})
    set_target_properties(${target} PROPERTIES OUTPUT_NAME ${name} LIBRARY_OUTPUT_DIRECTORY "${output}")
endfunction()
