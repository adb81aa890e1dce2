package ntlm

import (
	"bytes"
	"encoding/asn1"
	"fmt"
)

var (
	oidSPNEGO = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 2}
	oidNTLM   = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 311, 2, 2, 10}
)

// States of a SPNEGO negotiation.
const (
	acceptCompleted  = 0
	acceptIncomplete = 1
)

type negotiationInit struct {
	Mechanisms asn1.RawValue `asn1:"explicit,tag:0"`
	Flags      asn1.RawValue `asn1:"optional,explicit,tag:1"`
	Token      []byte        `asn1:"optional,explicit,tag:2"`
	MIC        []byte        `asn1:"optional,explicit,tag:3"`
}

type negotiationResponse struct {
	State     asn1.Enumerated       `asn1:"optional,explicit,tag:0,default:0"`
	Mechanism asn1.ObjectIdentifier `asn1:"optional,explicit,tag:1"`
	Token     []byte                `asn1:"optional,explicit,tag:2"`
	MIC       []byte                `asn1:"optional,explicit,tag:3"`
}

// A Conversation is one connection's authentication, of NTLM messages as they
// are or in SPNEGO, whichever the client sends first.
type Conversation struct {
	server    *Server
	handshake *Handshake
	spnego    bool
	list      []byte // of the client's mechanisms, in DER
}

// NewConversation begins one.
func (s *Server) NewConversation() *Conversation { return &Conversation{server: s} }

// Step takes the client's next token. The answer, which may be nil, goes back
// to it; with a Session the client is in.
func (c *Conversation) Step(token []byte) (answer []byte, session *Session, err error) {
	if len(token) > maxMessage {
		return nil, nil, fmt.Errorf("%w: a token of %d bytes", ErrDenied, len(token))
	}
	if c.handshake == nil {
		answer, err = c.first(token)
		return answer, nil, err
	}
	inner := token
	var response negotiationResponse
	if c.spnego {
		if response, err = parseResponse(token); err != nil {
			return nil, nil, err
		}
		inner = response.Token
	}
	if session, err = c.handshake.Finish(inner); err != nil || !c.spnego {
		return nil, session, err
	}
	// The list of mechanisms is not covered by NTLM, so it is signed.
	if response.MIC == nil {
		answer, err = marshalResponse(negotiationResponse{State: acceptCompleted})
		return answer, session, err
	}
	mic, err := session.checkList(c.list, response.MIC)
	if err != nil {
		return nil, nil, err
	}
	answer, err = marshalResponse(negotiationResponse{State: acceptCompleted, MIC: mic})
	return answer, session, err
}

func (c *Conversation) first(token []byte) ([]byte, error) {
	if bytes.HasPrefix(token, []byte("NTLMSSP\x00")) {
		h, challenge, err := c.server.Begin(token)
		c.handshake = h
		return challenge, err
	}
	denied := func(why string) ([]byte, error) { return nil, fmt.Errorf("%w: %s", ErrDenied, why) }
	var outer asn1.RawValue
	if rest, err := asn1.Unmarshal(token, &outer); err != nil || len(rest) > 0 || outer.Class != asn1.ClassApplication || outer.Tag != 0 {
		return denied("neither NTLM nor SPNEGO")
	}
	var oid asn1.ObjectIdentifier
	inner, err := asn1.Unmarshal(outer.Bytes, &oid)
	if err != nil || !oid.Equal(oidSPNEGO) {
		return denied("a mechanism that is not SPNEGO")
	}
	var init negotiationInit
	if _, err := asn1.UnmarshalWithParams(inner, &init, "explicit,tag:0"); err != nil {
		return denied("a damaged first token")
	}
	var mechanisms []asn1.ObjectIdentifier
	if _, err := asn1.Unmarshal(init.Mechanisms.FullBytes, &mechanisms); err != nil {
		// RawValue of an explicit field may hold the tag around it.
		if _, err := asn1.Unmarshal(init.Mechanisms.Bytes, &mechanisms); err != nil {
			return denied("a damaged list of mechanisms")
		}
		c.list = bytes.Clone(init.Mechanisms.Bytes)
	} else {
		c.list = bytes.Clone(init.Mechanisms.FullBytes)
	}
	at := -1
	for i, m := range mechanisms {
		if m.Equal(oidNTLM) {
			at = i
		}
	}
	if at < 0 {
		return denied("no NTLM among the mechanisms")
	}
	if at > 0 || len(init.Token) == 0 {
		return denied("NTLM is not the mechanism of choice, and this host has no Kerberos")
	}
	h, challenge, err := c.server.Begin(init.Token)
	if err != nil {
		return nil, err
	}
	c.handshake, c.spnego = h, true
	return marshalResponse(negotiationResponse{State: acceptIncomplete, Mechanism: oidNTLM, Token: challenge})
}

func parseResponse(token []byte) (negotiationResponse, error) {
	var r negotiationResponse
	if rest, err := asn1.UnmarshalWithParams(token, &r, "explicit,tag:1"); err != nil || len(rest) > 0 {
		return r, fmt.Errorf("%w: a damaged SPNEGO token", ErrDenied)
	}
	return r, nil
}

// marshalResponse writes r; asn1 alone would leave out a state of 0.
func marshalResponse(r negotiationResponse) ([]byte, error) {
	type fields struct {
		State     asn1.Enumerated       `asn1:"explicit,tag:0"`
		Mechanism asn1.ObjectIdentifier `asn1:"optional,explicit,tag:1"`
		Token     []byte                `asn1:"optional,omitempty,explicit,tag:2"`
		MIC       []byte                `asn1:"optional,omitempty,explicit,tag:3"`
	}
	return asn1.MarshalWithParams(fields(r), "explicit,tag:1")
}
