# Makes the lab's mount namespace, says so, and waits for its standard input to
# end, which it does when the process that started the lab is gone, however
# that came. Then whatever still runs is ended by the ids it left.
#
# Arguments: the lab's directory, and "kvm" or "tcg". Run by "unshare --mount", so nothing that is
# mounted here is seen outside.
dir=$1
for name in etc run cache log; do
	mkdir -p "$dir/$name"
	chmod 755 "$dir/$name"
done
mkdir -p /etc/libvirt /run/libvirt /var/cache/libvirt /var/log/libvirt
mount --bind "$dir/etc" /etc/libvirt &&
	mount --bind "$dir/run" /run/libvirt &&
	mount --bind "$dir/cache" /var/cache/libvirt &&
	mount --bind "$dir/log" /var/log/libvirt || exit 1
# A /dev/kvm that root can open and QEMU's user cannot makes libvirt ask QEMU
# again and again what it can do, at some seconds each time.
if [ "$2" != kvm ] && [ -e /dev/kvm ]; then
	: >"$dir/no-kvm" && chmod 0 "$dir/no-kvm" && mount --bind "$dir/no-kvm" /dev/kvm || exit 1
fi
# Through D-Bus libvirtd would register its guests with the machine's systemd.
[ -d /run/dbus ] && mount -t tmpfs none /run/dbus
echo ready

# end PIDFILE PROGRAM: only if the id still belongs to such a program.
end() {
	[ -s "$1" ] || return
	pid=$(cat "$1")
	case $(readlink "/proc/$pid/exe") in */"$2"*) kill -9 "$pid" ;; esac
}
read -r _
end "$dir/libvirtd.pid" libvirtd
for file in "$dir"/run/qemu/*.pid; do
	end "$file" qemu-system
done
# Only a lab that was left without a Stop still has these.
for file in "$dir"/etc/qemu/*.xml; do
	[ -e "$file" ] || continue
	name=$(basename "$file" .xml)
	rm -rf "/var/lib/libvirt/qemu/checkpoint/$name" "/var/lib/libvirt/qemu/snapshot/$name"
done
[ -e "$dir/remove" ] && rm -rf "$dir"
exit 0
