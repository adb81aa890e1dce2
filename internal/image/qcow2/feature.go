package qcow2

import (
	"fmt"
	"math/bits"
	"strings"
)

// The groups of feature bits, as the table of their names has them.
const (
	featureIncompatible = 0
	featureCompatible   = 1
	featureAutoclear    = 2
)

// A feature is one bit of one group.
type feature struct{ group, bit uint8 }

// featureNames is how the program that wrote an image calls its features.
type featureNames map[feature]string

// parseFeatureNames reads the header extension of that name, whose entries
// have 48 bytes each.
func parseFeatureNames(p []byte) featureNames {
	names := featureNames{}
	for ; len(p) >= 48; p = p[48:] {
		f := feature{p[0], p[1]}
		if f.group > featureAutoclear || f.bit > 63 {
			continue
		}
		name, _, _ := strings.Cut(string(p[2:48]), "\x00")
		names[f] = name
	}
	return names
}

// list names the features of a group that are set in x.
func (names featureNames) list(group uint8, x uint64) string {
	var all []string
	for ; x != 0; x &= x - 1 {
		bit := uint8(bits.TrailingZeros64(x))
		if name := names[feature{group, bit}]; name != "" {
			all = append(all, fmt.Sprintf("%q (bit %d)", name, bit))
		} else {
			all = append(all, fmt.Sprintf("bit %d", bit))
		}
	}
	what := "feature "
	if len(all) > 1 {
		what = "features "
	}
	return what + strings.Join(all, ", ")
}
