package hyperv

import (
	"errors"
	"fmt"
	"strings"

	"github.com/backstay/backstay/internal/fault"
)

// A family is a table of return codes. Hyper-V has two: methods that CIM
// defines have its small numbers, its own begin at 32768.
type family int

const (
	familyCIM family = iota
	familyMsvm
	familyImage // Msvm, with another meaning of 32779
)

const (
	returnDone    = 0
	returnStarted = 4096 // a job goes on
)

var cimCodes = map[int64]string{
	1: "not supported", 2: "failed", 3: "timed out", 4: "invalid parameter", 5: "invalid state", 6: "invalid type",
}

var msvmCodes = map[int64]string{
	32768: "failed", 32769: "access denied", 32770: "not supported", 32771: "status unknown", 32772: "timed out",
	32773: "invalid parameter", 32774: "the system is in use", 32775: "invalid state", 32776: "wrong type of data",
	32777: "the system is not available", 32778: "the host is out of memory", 32779: "the file is in use",
}

// A ReturnError is a method that did not do its work, and gave a code for why.
type ReturnError struct {
	Method string
	Code   int64
	family family
}

func (e *ReturnError) Error() string {
	return fmt.Sprintf("%s: %s (code %d)", e.Method, e.meaning(), e.Code)
}

func (e *ReturnError) meaning() string {
	switch {
	case e.family == familyImage && e.Code == 32779:
		return "file not found"
	case cimCodes[e.Code] != "":
		return cimCodes[e.Code]
	case msvmCodes[e.Code] != "":
		// Methods of the first family, too, give codes of the second.
		return msvmCodes[e.Code]
	}
	return "unknown reason"
}

// Is puts the codes into the classes that every layer knows.
func (e *ReturnError) Is(target error) bool {
	switch target {
	case fault.ErrDenied:
		return e.Code == 32769
	case fault.ErrNotFound:
		return e.family == familyImage && e.Code == 32779
	case fault.ErrUnsupported:
		return e.Code == 1 || e.Code == 32770 || e.family == familyCIM && e.Code == 6
	case errBusy, fault.ErrLocked:
		return e.busy()
	}
	return false
}

// refused says whether the method surely did nothing: the host did not take the
// call. After "failed" and the like something may have been made.
func (e *ReturnError) refused() bool {
	switch e.Code {
	case 1, 4, 5, 6, 32769, 32770, 32773, 32774, 32775, 32776, 32777:
		return true
	}
	return false
}

// busy says whether the host may do it a moment later.
func (e *ReturnError) busy() bool {
	switch e.Code {
	case 5, 32774, 32775, 32777:
		return true
	case 32779:
		return e.family == familyMsvm
	}
	return false
}

// errBusy is the class of answers that may be others a moment later.
var errBusy = errors.New("the host is busy with the VM")

// States of a job.
const (
	jobNew            = 2
	jobStarting       = 3
	jobRunning        = 4
	jobSuspended      = 5
	jobShuttingDown   = 6
	jobCompleted      = 7
	jobTerminated     = 8
	jobKilled         = 9
	jobException      = 10
	jobService        = 11
	jobWithWarnings   = 32768
	jobShuttingDownV2 = 32769
)

// A JobError is a job that the host began and did not bring to a good end.
type JobError struct {
	Method   string
	State    int64
	Code     int64    // ErrorCode, 0 for none
	Text     string   // as the host describes it, in the host's language
	Messages []string // of the Msvm_Errors behind it
}

func (e *JobError) Error() string {
	how := "it failed"
	switch e.State {
	case jobTerminated:
		how = "it was ended"
	case jobKilled:
		how = "it was killed"
	case jobWithWarnings:
		how = "it ended with warnings"
	}
	var all []string
	for _, s := range append([]string{e.Text}, e.Messages...) {
		s = strings.Join(strings.Fields(s), " ")
		if s != "" && !strings.Contains(strings.Join(all, " "), s) {
			all = append(all, s)
		}
	}
	if len(all) > 0 {
		how += ": " + strings.Join(all, "; ")
	}
	if e.Code != 0 {
		how += fmt.Sprintf(" (code %d)", e.Code)
	}
	return "the host's job " + e.Method + ": " + how
}

// Is puts the job's code into the same classes as a method's.
func (e *JobError) Is(target error) bool {
	return (&ReturnError{Method: e.Method, Code: e.Code, family: familyMsvm}).Is(target)
}
