package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

// authority makes certificates for one test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
	der  []byte
}

func newAuthority(t *testing.T) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	a := &authority{cert: cert, key: key, pool: x509.NewCertPool(), der: der}
	a.pool.AddCert(cert)
	return a
}

// issue makes a certificate for localhost, usable on both sides.
func (a *authority) issue(t *testing.T) (der []byte, key *ecdsa.PrivateKey) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err = x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	must(t, err)
	return der, key
}

func (a *authority) pair(t *testing.T) tls.Certificate {
	der, key := a.issue(t)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (a *authority) serverConfig(t *testing.T) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{a.pair(t)}, ClientCAs: a.pool, ClientAuth: tls.RequireAndVerifyClientCert}
}

func (a *authority) clientConfig(t *testing.T) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{a.pair(t)}, RootCAs: a.pool, MinVersion: tls.VersionTLS12}
}

// files writes what QEMU and GnuTLS programs look for in a directory.
func (a *authority) files(t *testing.T) string {
	dir := t.TempDir()
	put := func(name, kind string, der []byte) {
		must(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	der, key := a.issue(t)
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	put("ca-cert.pem", "CERTIFICATE", a.der)
	put("client-cert.pem", "CERTIFICATE", der)
	put("client-key.pem", "PRIVATE KEY", raw)
	return dir
}

func TestTLS(t *testing.T) {
	a, m := newAuthority(t), newMemory(4<<20)
	s := serve(t, server.Config{Exports: exports{"v": m}, TLS: a.serverConfig(t)})
	for _, uri := range []string{s.tcpURI("v"), "nbds" + s.tcpURI("v")[3:]} {
		c := dial(t, uri, a.clientConfig(t))
		want := random(3<<20, 4)
		_, err := c.WriteAt(want, 77)
		must(t, err)
		got := make([]byte, len(want))
		_, err = c.ReadAt(got, 77)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Fatal("reads something else through TLS")
		}
		if !c.Structured() || !c.HasBlockStatus() {
			t.Error("nothing was negotiated after TLS")
		}
	}
	if c := dial(t, s.uri("v"), nil); c.Size() != 4<<20 { // on loopback and unix sockets TLS is an offer
		t.Error("no plain connection on a unix socket")
	}
	for what, conf := range map[string]*tls.Config{
		"a client without a certificate": {RootCAs: a.pool, MinVersion: tls.VersionTLS12},
		"a client of another authority":  {RootCAs: a.pool, MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{newAuthority(t).pair(t)}},
		"a client that doubts us":        {RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{a.pair(t)}},
		"a client of TLS 1.1":            {RootCAs: a.pool, MinVersion: tls.VersionTLS11, MaxVersion: tls.VersionTLS11, Certificates: []tls.Certificate{a.pair(t)}},
	} {
		if _, err := client.Dial(context.Background(), s.tcpURI("v"), conf); err == nil {
			t.Errorf("%s was let in", what)
		}
	}
}

func TestTLSWithPrograms(t *testing.T) {
	a := newAuthority(t)
	s := serve(t, server.Config{Exports: exports{"v": newMemory(4 << 20)}, TLS: a.serverConfig(t)})
	dir := a.files(t)
	_, port, err := net.SplitHostPort(s.tcp)
	must(t, err)
	creds := "tls-creds-x509,id=c,endpoint=client,dir=" + dir
	image := "driver=nbd,host=localhost,port=" + port + ",export=v,tls-creds=c"
	tool(t, "qemu-io", "--object", creds, "--image-opts", image, "-c", "write -P 7 0 2M", "-c", "read -P 7 0 2M", "-c", "flush")
	out := tool(t, "nbdinfo", "nbds://localhost:"+port+"/v?tls-certificates="+dir)
	wantText(t, out, `protocol: newstyle-fixed with TLS`, `export-size: 4194304`)
}

// TestStateBeforeTLSIsForgotten: neither structured replies nor contexts agreed
// in clear count afterwards.
func TestStateBeforeTLSIsForgotten(t *testing.T) {
	a := newAuthority(t)
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}, TLS: a.serverConfig(t)})
	nc := greeted(t, raw(t, "tcp", s.tcp))
	wantReply(t, nc, nbd.OptStructured, nil, nbd.RepAck)
	wantReply(t, nc, nbd.OptSetMeta, nbd.AppendMetaRequest(nil, "v", nbd.ContextAllocation), nbd.RepAck)
	wantReply(t, nc, nbd.OptStartTLS, nil, nbd.RepAck)
	conf := a.clientConfig(t)
	conf.ServerName = "localhost"
	tc := tls.Client(nc, conf)
	must(t, tc.Handshake())
	wantReply(t, tc, nbd.OptStartTLS, nil, nbd.RepErrInvalid)
	wantReply(t, tc, nbd.OptSetMeta, nbd.AppendMetaRequest(nil, "v", nbd.ContextAllocation), nbd.RepErrInvalid)
	wantReply(t, tc, nbd.OptGo, nbd.AppendInfoRequest(nil, "v"), nbd.RepAck)
	mustWrite(t, tc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdRead, Len: 8, Cookie: 4}))
	if errno, cookie := simple(t, tc); errno != 0 || cookie != 4 {
		t.Errorf("error %d for %d", errno, cookie)
	}
}

// TestNothingIsInjectedBeforeTLS: bytes sent in clear behind STARTTLS are not
// taken for what comes out of TLS.
func TestNothingIsInjectedBeforeTLS(t *testing.T) {
	a := newAuthority(t)
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}, TLS: a.serverConfig(t)})
	nc := greeted(t, raw(t, "tcp", s.tcp))
	mustWrite(t, nc, append(nbd.AppendOption(nil, nbd.OptStartTLS, nil), nbd.AppendOption(nil, nbd.OptAbort, nil)...))
	answers(t, nc, nbd.OptStartTLS)
	gone(t, nc)
}

// TestPlainIsRefusedBeyondLoopback gives connections an address of the
// documentation's network.
func TestPlainIsRefusedBeyondLoopback(t *testing.T) {
	a := newAuthority(t)
	x := exports{"v": newMemory(1 << 20)}
	far := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		return &farListener{l}
	}
	bare := server.New(server.Config{Exports: x})
	if err := bare.Serve(far()); status.Of(err) != status.Permission {
		t.Errorf("Serve without TLS: %v", err)
	}
	must(t, bare.Close(context.Background()))

	end := make(chan error, 1)
	t.Cleanup(func() { wantKind(t, <-end, status.Shutdown) }) // after the server's own end
	s := serve(t, server.Config{Exports: x, TLS: a.serverConfig(t)})
	l := far()
	go func() { end <- s.Serve(l) }()
	addr := l.(*farListener).Listener.Addr().String()
	nc := greeted(t, raw(t, "tcp", addr))
	for _, id := range []uint32{nbd.OptList, nbd.OptGo, nbd.OptInfo, nbd.OptStructured, 999} {
		wantReply(t, nc, id, nil, nbd.RepErrTLSReqd)
	}
	wantReply(t, nc, nbd.OptAbort, nil, nbd.RepAck)
	old := greeted(t, raw(t, "tcp", addr))
	mustWrite(t, old, nbd.AppendOption(nil, nbd.OptExportName, []byte("v")))
	gone(t, old)
	_, err := client.Dial(context.Background(), "nbd://"+addr+"/v", nil)
	wantKind(t, err, status.Permission)
	if c := dial(t, "nbd://"+addr+"/v", a.clientConfig(t)); c.Size() != 1<<20 {
		t.Error("no export through TLS")
	}
}

// farListener and farConn claim an address beyond loopback.
type farListener struct{ net.Listener }

func (l *farListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }

func (l *farListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &farConn{c}, nil
}

type farConn struct{ net.Conn }

func (c *farConn) LocalAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }
