package wsman

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"mime"
	"strconv"
	"strings"

	"github.com/backstay/backstay/sim/hyperv/ntlm"
)

const (
	sealedProtocol = "application/HTTP-SPNEGO-session-encrypted"
	sealedType     = `multipart/encrypted;protocol="` + sealedProtocol + `";boundary="Encrypted Boundary"`
	soapType       = "application/soap+xml;charset=UTF-8"
)

// unseal is the message of a sealed body (MS-WSMV 2.2.9.1).
func unseal(s *ntlm.Session, contentType string, body []byte) ([]byte, error) {
	kind, params, err := mime.ParseMediaType(contentType)
	if err != nil || kind != "multipart/encrypted" || !strings.EqualFold(params["protocol"], sealedProtocol) || params["boundary"] == "" {
		return nil, fmt.Errorf("content type %q", contentType)
	}
	boundary := "--" + params["boundary"]
	line := func() (string, bool) {
		l, rest, ok := bytes.Cut(body, []byte("\n"))
		if ok {
			body = rest
		}
		return strings.TrimSpace(string(l)), ok
	}
	length := -1
	for part := 0; part < 2; part++ {
		if l, ok := line(); !ok || l != boundary {
			return nil, errors.New("a boundary is missing")
		}
		for lines := 0; ; lines++ {
			l, ok := line()
			if !ok || lines > 10 {
				return nil, errors.New("headers without an end")
			}
			name, value, _ := strings.Cut(l, ":")
			if strings.EqualFold(name, "OriginalContent") {
				i := strings.LastIndex(value, "Length=")
				if i < 0 {
					return nil, errors.New("no length of the original content")
				}
				if length, err = strconv.Atoi(value[i+len("Length="):]); err != nil || length < 0 {
					return nil, errors.New("a wrong length of the original content")
				}
			}
			// No empty line ends the headers: the second part's has one header.
			if part == 0 && strings.EqualFold(name, "OriginalContent") || part == 1 && strings.EqualFold(name, "Content-Type") {
				break
			}
		}
	}
	if len(body) < 4 {
		return nil, errors.New("no signature")
	}
	n := int64(binary.LittleEndian.Uint32(body))
	if n != ntlm.SignatureBytes || int64(len(body)) < 4+n+int64(length) {
		return nil, errors.New("a body that is too short")
	}
	sealed := body[4+n : 4+n+int64(length)]
	if end := strings.TrimSpace(string(body[4+n+int64(length):])); end != boundary+"--" {
		return nil, errors.New("the last boundary is not where the length says")
	}
	return s.Open(body[4:4+n], sealed)
}

// seal is the body that carries message.
func seal(s *ntlm.Session, message []byte) []byte {
	signature, sealed := s.Seal(message)
	var b bytes.Buffer
	fmt.Fprintf(&b, "--Encrypted Boundary\r\n\tContent-Type: %s\r\n\tOriginalContent: type=%s;Length=%d\r\n--Encrypted Boundary\r\n\tContent-Type: application/octet-stream\r\n", sealedProtocol, soapType, len(message))
	b.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(signature))))
	b.Write(signature)
	b.Write(sealed)
	b.WriteString("--Encrypted Boundary--\r\n")
	return b.Bytes()
}
