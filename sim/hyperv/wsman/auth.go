package wsman

import (
	"context"
	"crypto/subtle"
	"encoding/base64"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/backstay/backstay/sim/hyperv/ntlm"
)

// A connection's authentication. Whoever has proved himself is known until the
// connection ends; another connection begins from nothing.
type connection struct {
	mu           sync.Mutex
	conversation *ntlm.Conversation
	session      *ntlm.Session
}

type connectionKey struct{}

func withConnection(ctx context.Context, _ net.Conn) context.Context {
	return context.WithValue(ctx, connectionKey{}, &connection{})
}

// authenticate lets r in, with a session where messages are sealed, or answers
// 401 itself and says so.
func (s *Server) authenticate(c *connection, w http.ResponseWriter, r *http.Request) (in bool) {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	switch strings.ToLower(scheme) {
	case "":
		if c.session != nil {
			return true
		}
		s.unauthorized(w, "")
		return false
	case "basic":
		user, password, ok := r.BasicAuth()
		if s.tls() && s.Basic && ok && strings.EqualFold(user, s.Account.User) {
			// Clients do not agree on the encoding.
			for _, want := range [][]byte{[]byte(s.Account.Password), latin1(s.Account.Password)} {
				if subtle.ConstantTimeCompare([]byte(password), want) == 1 {
					return true
				}
			}
		}
	case "negotiate", "ntlm":
		raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(token))
		if err != nil {
			break
		}
		if c.conversation == nil {
			c.conversation, c.session = s.ntlm.NewConversation(), nil
		}
		answer, session, err := c.conversation.Step(raw)
		if err != nil || session != nil {
			c.conversation = nil
		}
		if err != nil {
			s.logf("authentication: %v", err)
			break
		}
		encoded := scheme
		if answer != nil {
			encoded += " " + base64.StdEncoding.EncodeToString(answer)
		}
		if session == nil {
			s.unauthorized(w, encoded)
			return false
		}
		c.session = session
		if answer != nil {
			w.Header().Set("WWW-Authenticate", encoded)
		}
		return true
	}
	c.session = nil
	s.unauthorized(w, "")
	return false
}

// unauthorized answers 401, with the next token of a conversation or with what
// there is to choose from.
func (s *Server) unauthorized(w http.ResponseWriter, token string) {
	if token != "" {
		w.Header().Add("WWW-Authenticate", token)
	} else {
		w.Header().Add("WWW-Authenticate", "Negotiate")
		if s.tls() && s.Basic {
			w.Header().Add("WWW-Authenticate", `Basic realm="WSMAN"`)
		}
	}
	w.WriteHeader(http.StatusUnauthorized)
}

// latin1 is s in ISO 8859-1; what that has no place for is lost.
func latin1(s string) []byte {
	var p []byte
	for _, r := range s {
		p = append(p, byte(min(r, 0xff)))
	}
	return p
}
