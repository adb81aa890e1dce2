package wsman

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"mime"
	"strconv"
	"strings"

	"github.com/backstay/backstay/internal/wsman/internal/ntlm"
)

// Over plain HTTP every envelope is sealed by the session that NTLM began. It
// lies in a multipart of its own kind, which no parser of MIME reads: there is
// no empty line after a part's header, and the second part is binary.
//
//	--Encrypted Boundary
//	        Content-Type: application/HTTP-SPNEGO-session-encrypted
//	        OriginalContent: type=application/soap+xml;charset=UTF-8;Length=1234
//	--Encrypted Boundary
//	        Content-Type: application/octet-stream
//	length of the signature (u32, little-endian) | signature | sealed envelope
//	--Encrypted Boundary--
const (
	sealedProtocol = "application/HTTP-SPNEGO-session-encrypted"
	sealedBoundary = "Encrypted Boundary"
	sealedType     = `multipart/encrypted;protocol="` + sealedProtocol + `";boundary="` + sealedBoundary + `"`
)

// seal gives the body of a request.
func seal(s *ntlm.Session, envelope []byte) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "--%s\r\n\tContent-Type: %s\r\n\tOriginalContent: type=%s;Length=%d\r\n", sealedBoundary, sealedProtocol, soapType, len(envelope))
	fmt.Fprintf(&b, "--%s\r\n\tContent-Type: application/octet-stream\r\n", sealedBoundary)
	sealed := bytes.Clone(envelope)
	signature := s.Seal(sealed)
	b.Write(binary.LittleEndian.AppendUint32(nil, ntlm.SignatureSize))
	b.Write(signature[:])
	b.Write(sealed)
	fmt.Fprintf(&b, "--%s--\r\n", sealedBoundary)
	return b.Bytes()
}

// unseal opens the body of an answer, in place.
func unseal(s *ntlm.Session, contentType string, body []byte) ([]byte, error) {
	signature, sealed, err := splitSealed(contentType, body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if err := s.Open(sealed, signature); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return sealed, nil
}

// isSealed says whether a type of content is that of sealed ones.
func isSealed(contentType string) (boundary string, ok bool) {
	kind, params, err := mime.ParseMediaType(contentType)
	if err != nil || kind != "multipart/encrypted" || !strings.EqualFold(params["protocol"], sealedProtocol) || params["boundary"] == "" {
		return "", false
	}
	return params["boundary"], true
}

// splitSealed takes a body apart. It allocates nothing that the body does not
// hold.
func splitSealed(contentType string, body []byte) (signature [ntlm.SignatureSize]byte, sealed []byte, err error) {
	bad := func(why string) ([ntlm.SignatureSize]byte, []byte, error) {
		return signature, nil, fmt.Errorf("a sealed answer %s", why)
	}
	boundary, ok := isSealed(contentType)
	if !ok {
		return bad("of another kind")
	}
	rest, ok := bytes.CutPrefix(body, []byte("--"+boundary+"\r\n"))
	if !ok {
		return bad("does not begin with its boundary")
	}
	length := -1
	for {
		line, after, ok := bytes.Cut(rest, []byte("\r\n"))
		if !ok {
			return bad("ends in its header")
		}
		if rest = after; string(line) == "--"+boundary {
			break
		}
		name, value, _ := strings.Cut(strings.TrimSpace(string(line)), ":")
		if !strings.EqualFold(name, "OriginalContent") {
			continue
		}
		_, digits, _ := strings.Cut(strings.ToLower(value), "length=")
		if length, err = strconv.Atoi(strings.TrimSpace(digits)); err != nil || length < 0 {
			return bad("does not say how long the envelope is")
		}
	}
	line, rest, _ := bytes.Cut(rest, []byte("\r\n"))
	if length < 0 || !strings.EqualFold(strings.ReplaceAll(strings.TrimSpace(string(line)), " ", ""), "Content-Type:application/octet-stream") {
		return bad("lacks the header of a part")
	}
	if len(rest) < 4 || binary.LittleEndian.Uint32(rest) != ntlm.SignatureSize {
		return bad("has a signature that is not NTLM's")
	}
	if rest = rest[4:]; len(rest) < ntlm.SignatureSize || len(rest)-ntlm.SignatureSize < length {
		return bad("is shorter than it says")
	}
	signature, rest = [ntlm.SignatureSize]byte(rest), rest[ntlm.SignatureSize:]
	if end := strings.TrimSpace(string(rest[length:])); end != "--"+boundary+"--" {
		return bad("does not end with its boundary")
	}
	return signature, rest[:length], nil
}
