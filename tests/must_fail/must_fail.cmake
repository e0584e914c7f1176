# cmake -DCOMPILER= -DSTANDARD= -DINCLUDE= -DSYSTEM_INCLUDE= -DSOURCE= -DMESSAGE= -DFLAGS= -DPREFIX= -P must_fail.cmake
set(command "${COMPILER}" ${STANDARD} -fsyntax-only -Werror=unused-result "-I${INCLUDE}")
foreach(directory IN LISTS SYSTEM_INCLUDE)
  string(REGEX REPLACE "^\\$<BUILD_INTERFACE:(.*)>$" "\\1" directory "${directory}")
  list(APPEND command -isystem "${directory}")
endforeach()
list(APPEND command ${PREFIX}) # precompiled headers

execute_process(COMMAND ${command} -DVATTN_CORRECTED "${SOURCE}" RESULT_VARIABLE result ERROR_VARIABLE errors)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "the corrected form of ${SOURCE} does not compile:\n${errors}")
endif()
execute_process(COMMAND ${command} ${FLAGS} "${SOURCE}" RESULT_VARIABLE result ERROR_VARIABLE errors)
if(result EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiles, but must not")
endif()
if(NOT errors MATCHES "${MESSAGE}")
  message(FATAL_ERROR "${SOURCE} fails without the words '${MESSAGE}':\n${errors}")
endif()
