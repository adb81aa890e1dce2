package hypervisor

import (
	"fmt"

	"github.com/backstay/backstay/internal/fault"
	"github.com/backstay/backstay/internal/vm"
)

// Accept says whether a policy takes a grade, which is no better because of
// why: with a warning where it is less than preferred, with
// fault.ErrConsistency where it is not enough.
func Accept(c vm.Consistency, grade vm.Grade, why string) (warning string, err error) {
	want := vm.GradeCrash
	switch c {
	case vm.RequireApplication, vm.PreferApplication:
		want = vm.GradeApplication
	case vm.Filesystem:
		want = vm.GradeFilesystem
	}
	switch {
	case grade.AtLeast(want):
		return "", nil
	case c == vm.PreferApplication:
		return fmt.Sprintf("the restore point is %s-consistent only: %s", grade, why), nil
	}
	return "", fmt.Errorf("%s consistency: %s: %w", want, why, fault.ErrConsistency)
}
