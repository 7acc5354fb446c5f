# How every target here is compiled and linked.
find_package(Python3 COMPONENTS Interpreter)

function(dijiang_compile_options target)
    set_target_properties(${target} PROPERTIES
        CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
        CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
        POSITION_INDEPENDENT_CODE ON CUDA_SEPARABLE_COMPILATION OFF
        CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
    target_compile_definitions(${target} PRIVATE
        $<$<COMPILE_LANGUAGE:CXX>:DIJIANG_VERSION="${DIJIANG_VERSION}">
        $<$<COMPILE_LANGUAGE:CXX>:DIJIANG_ARCHITECTURES="${DIJIANG_ARCHITECTURES}">)
    target_compile_options(${target} PRIVATE
        $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
        $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
    if(DIJIANG_WARNINGS_AS_ERRORS)
        target_compile_options(${target} PRIVATE
            $<$<COMPILE_LANGUAGE:CXX>:-Werror>
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Werror;--Werror=all-warnings>)
    endif()
endfunction()

# A table of the registers, stack and spills of every kernel of the targets, made after each build of them:
# resource-report.txt for people, .json for tests. ptxas says them while it compiles; a launcher keeps what it said.
function(dijiang_resource_report)
    if(NOT Python3_FOUND)
        message(STATUS "No Python 3: no resource report")
        return()
    endif()
    set(launcher "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/keep_ptxas_output.sh")
    set(script "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/resource_report.py")
    set(objects "")
    foreach(target IN LISTS ARGN)
        target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
        set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER "/bin/sh;${launcher}")
        list(APPEND objects "$<TARGET_OBJECTS:${target}>")
    endforeach()
    set(report "${CMAKE_BINARY_DIR}/resource-report")
    add_custom_command(OUTPUT "${report}.txt" "${report}.json"
        COMMAND "${Python3_EXECUTABLE}" "${script}" --text "${report}.txt" --json "${report}.json" ${objects}
        DEPENDS ${ARGN} ${objects} "${script}"
        COMMENT "Registers and spills: ${report}.txt"
        COMMAND_EXPAND_LISTS VERBATIM)
    add_custom_target(resource-report ALL DEPENDS "${report}.txt" "${report}.json")
endfunction()

# lib<target>.so out of the kernels' objects (DIJIANG_OBJECTS), exporting what `map` lists and nothing else. Calls inside it stay
# inside it, whatever else of this project the process has loaded.
function(dijiang_shared_library target map)
    set(map "${CMAKE_CURRENT_SOURCE_DIR}/${map}")
    add_library(${target} SHARED ${ARGN})
    foreach(objects IN LISTS DIJIANG_OBJECTS)
        target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
    endforeach()
    dijiang_compile_options(${target})
    target_link_libraries(${target} PRIVATE dijiang_cudart)
    target_link_options(${target} PRIVATE
        -Wl,--version-script=${map} -Wl,-Bsymbolic -Wl,--exclude-libs,ALL -Wl,--gc-sections -Wl,--build-id=sha1)
    set_target_properties(${target} PROPERTIES
        LINKER_LANGUAGE CXX LINK_DEPENDS "${map}" LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}")
endfunction()
