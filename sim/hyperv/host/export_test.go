package host

import (
	"bytes"
	"crypto/sha256"
	"fmt"
)

// ReadDefinition reads a definition file's content and writes it again.
func ReadDefinition(p []byte) ([]byte, error) {
	c, err := parseDefinition(p)
	if err != nil {
		return nil, err
	}
	return c.encode(), nil
}

// MendDefinition gives content a sum that is right.
func MendDefinition(p []byte) []byte {
	rest := bytes.TrimPrefix(p, []byte(definitionMagic))
	if _, body, ok := bytes.Cut(rest, []byte("\n")); ok {
		rest = body
	}
	return append(fmt.Appendf(nil, "%s%x\n", definitionMagic, sha256.Sum256(rest)), rest...)
}
