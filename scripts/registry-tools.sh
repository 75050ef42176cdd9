# The real registry and its readers for the tests: Debian's docker-registry, skopeo and umoci.

registry_tools=(docker-registry skopeo umoci)

missing_registry_tools() {
    local tool
    for tool in "${registry_tools[@]}"; do
        command -v "$tool" >/dev/null || echo "$tool"
    done
}

# find_registry_tools: installs what is missing as root, unpacks it into .apt/ otherwise; without apt says what to do.
find_registry_tools() {
    export PATH="$PWD/.apt/usr/bin:$PATH"
    [ -z "$(missing_registry_tools)" ] && return
    if ! command -v apt-get >/dev/null; then
        echo "note: without $(missing_registry_tools | xargs) the registry tests are skipped (CI=true: they fail)" >&2
        return
    fi
    echo "── installing $(missing_registry_tools | xargs)" >&2
    if [ "$(id -u)" = 0 ]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${registry_tools[@]}" >/dev/null
    else
        unpack_registry_tools || true
    fi
    if [ -n "$(missing_registry_tools)" ]; then
        echo "note: for all tests run: sudo apt-get install $(missing_registry_tools | xargs)" >&2
    fi
}

# Without root: the packages and the libraries that the machine lacks, unpacked beside the project.
unpack_registry_tools() {
    mkdir -p .apt/packages
    local libraries
    libraries=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances "${registry_tools[@]}" 2>/dev/null | grep -E '^lib(gpgme|assuan|devmapper|gpg-error)' | sort -u)
    # shellcheck disable=SC2086  # a list of package names
    (cd .apt/packages && apt-get download -qq "${registry_tools[@]}" $libraries)
    local package
    for package in .apt/packages/*.deb; do
        dpkg-deb --extract "$package" .apt
    done
    export LD_LIBRARY_PATH="$PWD/.apt/usr/lib/$(uname -m)-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}
