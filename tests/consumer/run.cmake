# run(<command>...): stops with the command and all that it said unless it succeeds; leaves its output in `output`.
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  if(NOT result EQUAL 0)
    string(REPLACE ";" " " command "${ARGN}")
    message(FATAL_ERROR "${command}:\n${output}${errors}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()
