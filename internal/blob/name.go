package blob

import (
	"fmt"
	"strings"
)

// MaxNameBytes bounds an object's name; S3 takes 1024 with a prefix of its own.
const MaxNameBytes = 1000

// Reserved are the first segments that no object's name may have: stores keep
// their own things there.
var Reserved = []string{"tmp", "lock"}

// CheckName says what is wrong with name as the name of an object. Every
// implementation refuses such names in every call, so that none of them can be
// led out of its directory.
func CheckName(name string) error {
	if name == "" || len(name) > MaxNameBytes {
		return fmt.Errorf("object name of %d bytes: want 1 to %d", len(name), MaxNameBytes)
	}
	first := true
	for seg := range strings.SplitSeq(name, "/") {
		if seg == "" || seg[0] == '.' || len(seg) > 200 {
			return fmt.Errorf("object name %q has a bad segment", name)
		}
		for _, c := range []byte(seg) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' {
				return fmt.Errorf("object name %q has a character other than a-z, 0-9, \".\" and \"-\"", name)
			}
		}
		for _, r := range Reserved {
			if first && seg == r {
				return fmt.Errorf("object name %q begins with %q, which stores keep for themselves", name, r)
			}
		}
		first = false
	}
	return nil
}
